"""FP8 factors of a product: rounded with one scale a tensor (Micikevicius et al. 2022, arXiv 2209.05433)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType


def quantised(values: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """(values over their scale in `dtype`, the 0-D scale that restores them)."""
    # Without a copy of their sizes, which is large where nothing is compiled.
    largest = torch.linalg.vector_norm(values, torch.inf).float()
    scale = largest.clamp(min=1e-12) / torch.finfo(dtype).max
    # A 0-D factor is first rounded to the format of what it multiplies: fp16 has no room for a large one.
    return (values.float() * scale.reciprocal()).to(dtype), scale


def scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """a b in `dtype`; b by columns. `fast` sums in fewer bits on Hopper.

    For eager code: torch 2.11 cannot compile a graph with it.
    """
    whole = ScalingType.TensorWise
    return F.scaled_mm(a, b, scale_a, whole, scale_b, whole, output_dtype=dtype, use_fast_accum=fast)


def traced_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """The same for code that is compiled."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)
