"""Which experts take a token, and what keeps the experts evenly loaded.

With logits l = W x of E experts, the scores s are softmax(l) or sigmoid(l). The A experts with the largest
s + bias take the token; their outputs weigh s, for A > 1 divided by the sum of the A. The bias chooses and
never weighs.

Choice by context: l is the mean of W x over the document so far, up to the first token of a stretch of
`block` tokens, and the whole stretch goes where it points. Stretches begin at multiples of `block` and at the
beginnings of documents.

Balance, with f the share of the load that an expert has and P its mean share of the scores:
the auxiliary loss E sum_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961), which is 1 where all is even; the
router z-loss mean(logsumexp(l)^2) (Zoph et al. 2022, arXiv 2202.08906); and the loss-free bias (Wang et al.
2024, arXiv 2408.15664), whose "gradient" is f - 1/E: let `SignDescent` move it. All three reach the training
loss alone. No expert has a capacity, so no token is dropped and none takes another's place.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.config import Part
from sabrage.context import Context

# One byte numbers an expert where tokens are sorted, and a kernel looks at all of them at once.
MOST_EXPERTS = 64


@dataclass(frozen=True, kw_only=True)
class Gate(Part):
    """How tokens choose; `block` 0 lets each choose alone, otherwise it is the length of a stretch.

    `balance_loss` and `z_loss` weigh the terms of each layer in the training loss; 0 leaves them out.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    block: int = 0
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def problems(self) -> list[str]:
        return [
            f"gate.{name}={getattr(self, name)} must be at least 0"
            for name in ("block", "balance_loss", "z_loss")
            if getattr(self, name) < 0
        ]


class Router(nn.Module):
    """forward(x_BTD, context) -> (experts_NA, weights_NA, load_E): choices, weights in fp32, and counts.

    N is B T. `weight` (E, D) starts as torch's own Linear does, `bias` (E) at zero. All arithmetic is fp32.
    """

    def __init__(self, gate: Gate, *, dim: int, experts: int, active: int, layer: int) -> None:
        super().__init__()
        self.gate, self.active, self.layer = gate, active, layer
        self.weight = nn.Parameter(nn.Linear(dim, experts, bias=False).weight)
        self.bias = nn.Parameter(torch.zeros(experts))

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_BTE = F.linear(x_BTD.float(), self.weight.float())
            if self.gate.block:
                logits_BTE = self.hold(logits_BTE, context)
            logits_NE = logits_BTE.flatten(0, 1)
            scores_NE = logits_NE.softmax(-1) if self.gate.scores == "softmax" else logits_NE.sigmoid()
            ranks_NE = scores_NE.detach() + self.bias.detach()
            if self.active == 1:
                experts_NA = ranks_NE.argmax(-1, keepdim=True)
            else:
                experts_NA = ranks_NE.topk(self.active, dim=-1).indices
            chosen_NAE = experts_NA[..., None] == torch.arange(len(self.bias), device=x_BTD.device)
            # A sum over one score and zeros: a gather's gradient would be a scatter.
            weights_NA = (scores_NE[:, None] * chosen_NAE).sum(-1)
            if self.active > 1:
                weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
            load_E = chosen_NAE.sum((0, 1))
            if self.training:
                self.balance(logits_NE, scores_NE, load_E / load_E.sum(), context)
        return experts_NA, weights_NA, load_E

    def balance(self, logits_NE: Tensor, scores_NE: Tensor, share_E: Tensor, context: Context) -> None:
        """Adds the terms of the loss and notes for the log how sure and how even the choice is.

        Both entropies are shares of the largest, log E.
        """
        experts = len(self.bias)
        scores_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        even = experts * (share_E * scores_NE.mean(0)).sum()
        steer = (self.bias * (share_E - 1 / experts)).sum()
        # The last two are zero and leave the bias its gradient.
        context.add_loss("balance", self.gate.balance_loss * even + (steer - steer.detach()))
        if self.gate.z_loss:
            context.add_loss("router_z", self.gate.z_loss * logits_NE.logsumexp(-1).square().mean())
        most = math.log(experts)
        context.note("router_entropy", torch.special.entr(scores_NE.detach()).sum(-1).mean() / most)
        context.note("load_entropy", torch.special.entr(share_E).sum() / most)

    def hold(self, logits_BTE: Tensor, context: Context) -> Tensor:
        """The mean of the logits over the document, up to the first token of each token's stretch."""
        if context.cache is not None:
            return self.hold_cached(logits_BTE, context)
        length, device, documents_BT = logits_BTE.shape[1], logits_BTE.device, context.documents_BT
        time_T = torch.arange(length, device=device)
        grid_G = time_T[:: self.gate.block]
        seen_BGT = (time_T <= grid_G[:, None])[None]
        if documents_BT is not None:
            seen_BGT = seen_BGT & (documents_BT[:, None, :] == documents_BT[:, grid_G, None])
        # Zeros times logits add nothing, so that every mean is exactly that of what it may see.
        means_BGE = seen_BGT.float() @ logits_BTE / seen_BGT.sum(-1, keepdim=True)
        held_BTE = means_BGE[:, :, None].expand(-1, -1, self.gate.block, -1).flatten(1, 2)[:, :length]
        if documents_BT is None:
            return held_BTE
        begins_BT = torch.zeros_like(documents_BT, dtype=torch.bool)
        begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        first_BT = (begins_BT * time_T).cummax(1).values
        alone_BTE = logits_BTE.gather(1, first_BT[..., None].expand_as(logits_BTE))
        begun_BT = first_BT > time_T // self.gate.block * self.gate.block
        return torch.where(begun_BT[..., None], alone_BTE, held_BTE)

    def hold_cached(self, logits_BTE: Tensor, context: Context) -> Tensor:
        """The same for tokens whose document begins with the cache."""
        assert context.cache is not None, "no cache to hold the logits in"
        assert context.positions_BT is not None, "decoding needs the positions of its tokens"
        positions_BT = context.positions_BT
        entries_BSE = context.cache.extend(self.layer, gate=logits_BTE)["gate"].float()
        time_S = torch.arange(entries_BSE.shape[1], device=entries_BSE.device)
        # What lies beyond the end of a sequence may be anything, and 0 times that may be NaN.
        beyond_BS = time_S > positions_BT[:, -1:]
        entries_BSE = entries_BSE.masked_fill(beyond_BS[..., None], 0.0)
        grid_BT = positions_BT // self.gate.block * self.gate.block
        seen_BTS = time_S <= grid_BT[..., None]
        return seen_BTS.float() @ entries_BSE / (grid_BT + 1)[..., None]
