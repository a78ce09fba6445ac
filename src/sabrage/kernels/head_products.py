"""The three products of a cross-entropy head, in 16 bits or two of them in FP8, for a sample of its columns.

Shapes: N tokens, M of them in a sample and C in a chunk; K rows of W that are their columns.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.kernels.fp8 import quantised, scaled_product
from sabrage.kernels.sampled_columns import Sample

# Matrix units and FP8 want multiples of this many rows of W.
ROW_MULTIPLE = 64
# Half of e5m2's largest finite value, 57,344: rounding up must not reach infinity.
GRADIENT_RANGE = 28672.0


class Products:
    """The products of some tokens and the rows of W that are their columns, in the dtype of h."""

    def __init__(self, h_MD: Tensor, table_KD: Tensor) -> None:
        self.h_MD, self.table_KD = h_MD, table_KD
        self.grad_scale = torch.ones((), device=h_MD.device)

    def logits(self, part: slice) -> Tensor:
        return self.h_MD[part] @ self.table_KD.t()

    def narrow(self, logits_CK: Tensor) -> Tensor | None:
        """Where the kernel writes a narrower copy of the logits' gradient, if one is wanted."""
        return None

    def hidden_gradient(self, grad_CK: Tensor, narrow_CK: Tensor | None, out_CD: Tensor) -> None:
        torch.mm(grad_CK, self.table_KD, out=out_CD)


class Fp8Products(Products):
    """FP8 products of factors with one scale each, (e4m3, scale).

    A logit's gradient never exceeds sum_w |c_w|: its scale is known before it is, and e5m2 spans the rest.
    Every scale is a tensor of its own: cuBLAS wants the pointers aligned to 16 bytes.
    """

    def __init__(
        self, h_MD: Tensor, h: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor], grad_scale: Tensor
    ) -> None:
        super().__init__(h_MD, table[0])
        self.narrow_MD, self.h_scale = h
        self.table_scale, self.grad_scale = table[1], grad_scale
        self.table_DK = self.table_KD.t().contiguous()

    def logits(self, part: slice) -> Tensor:
        # A logit is a sum of D numbers, rounded to 16 bits afterwards: few bits will do on the way.
        scales = self.h_scale, self.table_scale
        return scaled_product(self.narrow_MD[part], self.table_KD.t(), *scales, self.h_MD.dtype, fast=True)

    def narrow(self, logits_CK: Tensor) -> Tensor | None:
        return torch.empty(logits_CK.shape, device=logits_CK.device, dtype=torch.float8_e5m2)

    def hidden_gradient(self, grad_CK: Tensor, narrow_CK: Tensor | None, out_CD: Tensor) -> None:
        assert narrow_CK is not None
        scales = self.grad_scale, self.table_scale
        out_CD.copy_(scaled_product(narrow_CK, self.table_DK.t(), *scales, out_CD.dtype, fast=False))


def products_by_sample(
    h_ND: Tensor, weight_VD: Tensor, coefficients_W: Tensor, fp8: bool
) -> Callable[[Sample], Products]:
    """What makes the products of a sample; what FP8 rounds is rounded here, once for all samples."""
    h_ND = h_ND.contiguous()

    def plain(sample: Sample) -> Products:
        table_KD = weight_VD if sample.ids_K is None else weight_VD[sample.ids_K]
        return Products(h_ND[sample.part], _padded(table_KD.to(h_ND.dtype)))

    if not fp8 or not len(h_ND):
        return plain
    (narrow_ND, h_scale), (narrow_VD, scale) = quantised(h_ND), quantised(weight_VD)
    grad_scale = coefficients_W.abs().sum().clamp(min=1e-12) / GRADIENT_RANGE

    def rounded(sample: Sample) -> Products:
        # As bytes, which every operation takes; a byte of zeros is the number 0.
        bytes_VD = narrow_VD.view(torch.uint8)
        bytes_KD = _padded(bytes_VD if sample.ids_K is None else bytes_VD[sample.ids_K])
        h, table = (narrow_ND[sample.part], h_scale), (bytes_KD.view(narrow_VD.dtype), scale)
        return Fp8Products(h_ND[sample.part], h, table, grad_scale)

    return rounded


def accumulated(grad_KD: Tensor | None, logit_grads_CK: Tensor, h_CD: Tensor) -> Tensor:
    """grad + logit_grads^T h, in place where there is a grad: 16-bit factors summed in fp32."""
    factors = logit_grads_CK.t(), h_CD
    if not h_CD.is_cuda or h_CD.dtype == torch.float32:
        # Off CUDA torch has no product of 16-bit factors with an fp32 sum.
        added_KD = factors[0].float() @ factors[1].float()
        return added_KD if grad_KD is None else grad_KD.add_(added_KD)
    if grad_KD is None:
        return torch.mm(*factors, out_dtype=torch.float32)
    return torch.addmm(grad_KD, *factors, out_dtype=torch.float32, out=grad_KD)


def _padded(table_KD: Tensor) -> Tensor:
    """With rows of zeros up to the next multiple of ROW_MULTIPLE."""
    extra = -len(table_KD) % ROW_MULTIPLE
    return (F.pad(table_KD, (0, 0, 0, extra)) if extra else table_KD).contiguous()
