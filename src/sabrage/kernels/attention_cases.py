"""What stands between a projection and attention, and attention itself, with their cases, for `catalogue`."""

from typing import Any

import torch
from torch import Tensor

from sabrage.kernels import rotary_norm, span_attention
from sabrage.kernels.cases import Case, Operation, normal


def _rotary_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Strided cases lie within a wider projection."""
    batch, time, heads, width = (case.sizes[name] for name in ("B", "T", "H", "K"))
    angle_TK = torch.arange(time, device=generator.device)[:, None] / 10000 ** torch.linspace(
        0, 1, width // 2, device=generator.device
    )
    wide = 4 if case.strided else 3
    adds = case.sizes["adds"]
    return {
        "qkv_BTHK": normal(generator, batch, time, wide * heads, width, dtype=dtype)[:, :, : 3 * heads],
        "cosine_TK": angle_TK.cos(),
        "sine_TK": angle_TK.sin(),
        "addend_BTHK": normal(generator, batch, time, heads, width, dtype=dtype) if adds else None,
    }


ROTARY_NORM = Operation(
    name="rotary_norm",
    fused=rotary_norm.rotary_norm,
    plain=rotary_norm.rotary_norm_reference,
    inputs=_rotary_inputs,
    outputs=("q", "k", "v"),
    gradients=("qkv_BTHK", "addend_BTHK"),
    cases=(
        Case("odd", {"B": 3, "T": 7, "H": 5, "K": 22, "adds": 1}),
        Case("inside a projection", {"B": 2, "T": 9, "H": 4, "K": 32, "adds": 0}, strided=True),
        Case("empty", {"B": 0, "T": 7, "H": 4, "K": 32, "adds": 1}),
        Case("GPT-2 heads", {"B": 64, "T": 1024, "H": 12, "K": 64, "adds": 0}, measured=True),
        Case("six wide heads", {"B": 64, "T": 1024, "H": 6, "K": 128, "adds": 0}, measured=True),
        Case("six wide heads, added", {"B": 64, "T": 1024, "H": 6, "K": 128, "adds": 1}, measured=True),
    ),
    memory_bytes=lambda case, size: (
        size
        * (14 + case.sizes["adds"])
        * case.sizes["B"]
        * case.sizes["T"]
        * case.sizes["H"]
        * case.sizes["K"]
    ),
    flops=lambda case: 0,
)


def _documents(case: Case, generator: torch.Generator) -> Tensor | None:
    """(B, T) numbers of documents whose mean length is the case's, 0 for none."""
    if not case.sizes["documents"]:
        return None
    shape, device = (case.sizes["B"], case.sizes["T"]), generator.device
    begins_BT = torch.rand(shape, generator=generator, device=device) < 1 / case.sizes["documents"]
    return begins_BT.cumsum(1)


def _span_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Strided cases are the thirds of a fused projection."""
    batch, time, heads, width = (case.sizes[name] for name in ("B", "T", "H", "K"))
    documents_BT = _documents(case, generator)
    if case.strided:
        parts = normal(generator, batch, time, 3, heads, width, dtype=dtype).unbind(2)
    else:
        parts = tuple(normal(generator, batch, time, heads, width, dtype=dtype) for _ in range(3))
    like_BT = torch.empty(batch, time, device=generator.device, dtype=torch.int8)
    starts_BT, ends_BN = span_attention.spans(like_BT, documents_BT, case.sizes["window"] or None)
    named = dict(zip(("q_BTHK", "k_BTHK", "v_BTHK"), parts, strict=True))
    return named | {"starts_BT": starts_BT, "ends_BN": ends_BN}


def _span_flops(case: Case) -> int:
    """Two products of two FLOPs a visible pair, and five; documents are half seen on average."""
    seen = min(filter(None, (case.sizes["window"], case.sizes["documents"], case.sizes["T"])))
    pairs = case.sizes["B"] * case.sizes["T"] * seen // (1 if seen == case.sizes["window"] else 2)
    return 14 * pairs * case.sizes["H"] * case.sizes["K"]


def _span_reference(*, ends_BN: Tensor, **arguments: Any) -> tuple[Tensor]:
    return (span_attention.span_attention_reference(**arguments),)


SPAN_ATTENTION = Operation(
    name="span_attention",
    fused=lambda **arguments: (span_attention.span_attention(**arguments),),
    plain=_span_reference,
    inputs=_span_inputs,
    outputs=("out",),
    gradients=("q_BTHK", "k_BTHK", "v_BTHK"),
    cases=(
        Case("causal", {"B": 2, "T": 128, "H": 2, "K": 32, "window": 0, "documents": 0}),
        Case("odd", {"B": 3, "T": 77, "H": 3, "K": 22, "window": 0, "documents": 20}),
        Case("window", {"B": 1, "T": 150, "H": 2, "K": 16, "window": 33, "documents": 0}, {"scale": 0.3}),
        Case("thirds", {"B": 2, "T": 192, "H": 2, "K": 32, "window": 65, "documents": 50}, strided=True),
        Case("few tokens", {"B": 2, "T": 3, "H": 2, "K": 64, "window": 0, "documents": 0}),
        Case("empty", {"B": 0, "T": 7, "H": 2, "K": 32, "window": 0, "documents": 0}),
        Case("near", {"B": 32, "T": 2048, "H": 6, "K": 128, "window": 512, "documents": 415}, measured=True),
        Case("far", {"B": 32, "T": 2048, "H": 6, "K": 128, "window": 0, "documents": 415}, measured=True),
    ),
    # q, k, v and the output, and their gradients.
    memory_bytes=lambda case, size: (
        size * 8 * case.sizes["B"] * case.sizes["T"] * case.sizes["H"] * case.sizes["K"]
    ),
    flops=_span_flops,
    # In fp32 the kernel's powers of two err a little more than torch's exponentials.
    slack=2.5,
)
