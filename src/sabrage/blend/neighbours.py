"""What followed the states of the training text that are most like the present one.

    p(token) = sum over states s near the query with next token = token of softmax_s(b cos(h, h_s))

A nearest-neighbour language model (Khandelwal et al. 2020, arXiv 1911.00172) with the kernel of the
continuous cache. States are centred, cut to their leading principal components and scaled to unit length.
They lie in the cells of a spherical k-means, and a query is compared with all states of the cells whose
centres are nearest to it (an inverted file: Sivic and Zisserman 2003; Johnson et al. 2017, arXiv 1702.08734).
The queries of a cell are compared with its states in tiles, so that few launches serve all cells.

Shapes: M states, N queries, D their width, K that of a key, C cells, S sharpnesses; a tile is Q queries by Y
states.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.config import Part

# Beyond this a sharpness b makes exp(-2 b) less than fp32 can tell from zero.
SHARPEST = 40.0
# Queries and states of a tile, tiles that are worked on at once, and cosines that may be held at once.
QUERIES, STATES, TILES, COSINES = 64, 512, 2048, 1 << 26
ROUNDS, SAMPLE = 6, 128


@dataclass(frozen=True, kw_only=True)
class Neighbours(Part):
    """The newest `tokens` of the training text are remembered by `width` numbers of 16 bits each.

    They lie in `cells` cells, of which `probes` are searched. There is one expert for each sharpness b.
    """

    tokens: int = 1 << 24
    width: int = 128
    cells: int = 4096
    probes: int = 8
    sharpness: tuple[float, ...] = (10.0, 20.0, 40.0)

    def problems(self) -> list[str]:
        found = [
            f"neighbours.{name}={getattr(self, name)} must be above 0"
            for name in ("tokens", "width", "cells", "probes")
            if getattr(self, name) <= 0
        ]
        if not self.sharpness or not all(0 < b <= SHARPEST for b in self.sharpness):
            found.append(f"neighbours.sharpness={self.sharpness}, allowed: above 0, up to {SHARPEST:g}")
        return found


class Memory:
    """The states of a text and what followed them; `batches` are (h_MD, following_M), at least one state."""

    def __init__(self, part: Neighbours, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.part = part
        keys: list[Tensor] = []
        following: list[Tensor] = []
        for h_MD, following_M in batches:
            if not keys:
                self.mean_D, self.basis_DK = principal(h_MD, part.width)
            keys.append(self.keys(h_MD))
            following.append(following_M.int())
        if not keys:
            raise ValueError("a memory without states has no neighbours")
        keys_MK, following_M = torch.cat(keys), torch.cat(following)
        keys.clear()
        # Cells with few states would be found for what lies beside them.
        cells = min(part.cells, max(len(keys_MK) // SAMPLE, 1))
        self.centres_CK = centres(keys_MK, cells)
        cell_M = nearest(keys_MK, self.centres_CK, 1)[:, 0]
        order_M = cell_M.argsort(stable=True)
        self.keys_MK, self.following_M = keys_MK[order_M], following_M[order_M]
        self.sizes_C = cell_M.bincount(minlength=cells)
        self.probes = min(part.probes, cells)

    def keys(self, h_MD: Tensor) -> Tensor:
        """States as keys, of unit length; 11 bits tell cosines apart that 8 would not."""
        keys_MK = F.normalize((h_MD.float() - self.mean_D) @ self.basis_DK, dim=1)
        return keys_MK.half() if h_MD.device.type == "cuda" else keys_MK

    def say(self, h_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the targets (N, S), features (N, 1 + S)).

        Where no cell that is searched holds a state, the first feature is -1 and the rest mean nothing.
        """
        q_NK, targets_N = self.keys(h_ND), targets_N.int()
        count, kinds, device = len(q_NK), len(self.part.sharpness), q_NK.device
        total_NS, hits_NS = (torch.zeros(count, kinds, device=device) for _ in range(2))
        near_N = torch.full((count,), -1.0, device=device)
        cells_NP = nearest(q_NK, self.centres_CK, self.probes)
        cell_A, order_A = cells_NP.flatten().sort(stable=True)
        asked_A = order_A // self.probes
        states = Tiled(self.sizes_C, STATES)
        queries = Tiled(cell_A.bincount(minlength=len(self.sizes_C)), QUERIES)
        cell_T = torch.arange(len(self.sizes_C), device=device).repeat_interleave(
            states.tiles * queries.tiles
        )
        before_C = (states.tiles * queries.tiles).cumsum(0) - states.tiles * queries.tiles
        within_T = torch.arange(len(cell_T), device=device) - before_C[cell_T]
        for at in range(0, len(cell_T), TILES):
            cell_t, within_t = cell_T[at : at + TILES], within_T[at : at + TILES]
            wide_t = states.tiles[cell_t]
            place_tQ, asking_tQ = queries.places(cell_t, within_t // wide_t)
            place_tY, held_tY = states.places(cell_t, within_t % wide_t)
            n_tQ = asked_A[place_tQ]
            alike_tQY = torch.bmm(q_NK[n_tQ], self.keys_MK[place_tY].mT).float()
            alike_tQY = alike_tQY.masked_fill(~held_tY[:, None], -torch.inf)
            same_tQY = targets_N[n_tQ][..., None] == self.following_M[place_tY][:, None]
            chosen = n_tQ[asking_tQ]
            near_N.scatter_reduce_(0, chosen, alike_tQY.amax(2)[asking_tQ], "amax")
            for kind, b in enumerate(self.part.sharpness):
                weight_tQY = (b * (alike_tQY - 1)).exp()
                hits_tQ = torch.where(same_tQY, weight_tQY, 0.0).sum(2)
                total_NS[:, kind].index_add_(0, chosen, weight_tQY.sum(2)[asking_tQ])
                hits_NS[:, kind].index_add_(0, chosen, hits_tQ[asking_tQ])
        # How many states share the weight, had all of them the nearest one's.
        shared_NS = total_NS.clamp(min=1e-37).log() - (near_N[:, None] - 1) * total_NS.new_tensor(
            self.part.sharpness
        )
        features_NX = torch.cat((near_N[:, None], shared_NS.clamp(min=0) / 4 - 1), 1)
        return (hits_NS / total_NS.clamp(min=1e-37)).log(), features_NX


class Tiled:
    """Things sorted by cell, `sizes_C` of them in each, in tiles of `width` that hold one cell each."""

    def __init__(self, sizes_C: Tensor, width: int) -> None:
        self.ends_C, self.width = sizes_C.cumsum(0), width
        self.starts_C = self.ends_C - sizes_C
        self.tiles = -(-sizes_C // width)

    def places(self, cell_T: Tensor, number_T: Tensor) -> tuple[Tensor, Tensor]:
        """The places of these tiles of these cells, (T, width), and which of them belong to the cell."""
        offsets = torch.arange(self.width, device=cell_T.device)
        place_TW = (self.starts_C[cell_T] + number_T * self.width)[:, None] + offsets
        held_TW = place_TW < self.ends_C[cell_T][:, None]
        return torch.where(held_TW, place_TW, 0), held_TW


def principal(h_MD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(mean (D,), leading principal components (D, K)) of states, K at most `width`."""
    h_MD = h_MD.float()
    mean_D = h_MD.mean(0)
    centred_MD = h_MD - mean_D
    covariance_DD = (centred_MD.T @ centred_MD / len(h_MD)).cpu().double()
    _, vectors_DD = torch.linalg.eigh(covariance_DD)
    return mean_D, vectors_DD.flip(1)[:, :width].float().to(h_MD.device)


def centres(keys_MK: Tensor, cells: int) -> Tensor:
    """The centres (C, K) of a spherical k-means of a sample of the keys, drawn and begun by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(keys_MK), generator=generator)[: cells * SAMPLE]
    sample_MK = keys_MK[drawn.to(keys_MK.device)]
    found_CK = sample_MK[:cells].clone()
    for _ in range(ROUNDS):
        cell_M = nearest(sample_MK, found_CK, 1)[:, 0]
        sums_CK = torch.zeros(found_CK.shape, device=found_CK.device)
        sums_CK.index_add_(0, cell_M, sample_MK.float())
        filled_C = cell_M.bincount(minlength=cells) > 0
        found_CK = torch.where(filled_C[:, None], F.normalize(sums_CK, dim=1).to(keys_MK.dtype), found_CK)
    return found_CK


def nearest(keys_MK: Tensor, centres_CK: Tensor, probes: int) -> Tensor:
    """The cells (M, P) whose centres are nearest to each key, the nearest first."""
    rows = max(COSINES // len(centres_CK), 1)
    pieces = [(piece @ centres_CK.T).topk(probes, dim=1).indices for piece in keys_MK.split(rows)]
    return torch.cat(pieces)
