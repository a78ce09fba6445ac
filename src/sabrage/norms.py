"""Root-mean-square normalisation without learned weights (Zhang and Sennrich 2019, arXiv 1910.07467).

y = x / sqrt(mean(x^2) + eps), computed in fp32 and returned in the input's dtype.
"""

import torch
from torch import Tensor


def rms_norm(x_X: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Normalises the last dimension to unit root mean square."""
    wide = x_X.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_X.dtype)
