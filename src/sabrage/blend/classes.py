"""Classes of tokens, for contexts in which it matters less which token stood than of what kind it was.

Tokens are put together by what the network has learned of them, its rows at the input and in the head, each
of length one: what follows a token and what comes before it. The classes are those of k-means (Lloyd 1982,
"Least squares quantization in PCM") with tokens weighed by the root of how often they occur. Counts after
classes: Brown et al. 1992, "Class-based n-gram models of natural language", Computational Linguistics 18(4).

Shapes: V tokens, K classes, D numbers of a row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 15


@torch.no_grad()
def classes_of(rows: Sequence[Tensor], counts_V: Tensor, number: int, *, seed: int) -> Tensor:
    """(V,) int64 below `number`, from tables of rows (V, D), D for each its own, and occurrences."""
    row_VD = torch.cat([F.normalize(each_VD.float(), dim=1) for each_VD in rows], 1)
    weight_V = counts_V.float().add(1).sqrt()
    generator = torch.Generator().manual_seed(seed)
    number = min(number, len(row_VD))
    first_K = torch.multinomial(weight_V.cpu(), number, generator=generator).to(row_VD.device)
    centre_KD = row_VD[first_K]
    class_V = nearest(row_VD, centre_KD)
    for _ in range(ROUNDS):
        # As a product, which adds in the same order every time.
        member_VK = F.one_hot(class_V, number).float() * weight_V[:, None]
        size_K1 = member_VK.sum(0)[:, None]
        centre_KD = torch.where(size_K1 > 0, (member_VK.T @ row_VD) / size_K1.clamp(min=1e-9), centre_KD)
        class_V = nearest(row_VD, centre_KD)
    return class_V


def nearest(row_VD: Tensor, centre_KD: Tensor) -> Tensor:
    """(V,) the number of each row's nearest centre."""
    return (centre_KD.square().sum(1) - 2 * row_VD @ centre_KD.T).argmin(1)
