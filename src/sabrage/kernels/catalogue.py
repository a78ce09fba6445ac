"""Every operation of this room with its cases: what tests and benchmarks walk through."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.kernels import (
    cross_entropy,
    grouped_product,
    linear_activation,
    residual_norm,
    symmetric_product,
)
from sabrage.kernels.attention_cases import ROTARY_NORM, SPAN_ATTENTION
from sabrage.kernels.cases import Case, Operation, normal
from sabrage.kernels.paged_cases import PAGED_ATTENTION, PAGED_LATENT


def _alone(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """The function with the one tensor that it returns in a tuple."""
    return lambda **arguments: (function(**arguments),)


def _cross_entropy_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    tokens, dim, rows, sets = (case.sizes[name] for name in ("N", "D", "V", "W"))
    num_real = case.options.get("num_real", rows)
    shape, device = (tokens, sets), generator.device
    targets_NW = torch.randint(0, num_real, shape, generator=generator, device=device)
    ignored = torch.rand(shape, generator=generator, device=device) < 0.1
    return {
        "h_ND": normal(generator, tokens, dim, dtype=dtype, strided=case.strided),
        "weight_VD": normal(generator, rows, dim, dtype=dtype, scale=dim**-0.5, strided=case.strided),
        "targets_NW": targets_NW.masked_fill(ignored, -1),
        "weights_W": 0.5 ** torch.arange(sets, device=device),
    }


CROSS_ENTROPY = Operation(
    name="cross_entropy",
    fused=cross_entropy.cross_entropy_head,
    plain=cross_entropy.cross_entropy_head_reference,
    inputs=_cross_entropy_inputs,
    outputs=("total", "losses"),
    gradients=("h_ND", "weight_VD"),
    cases=(
        Case("odd", {"N": 63, "D": 48, "V": 217, "W": 1}),
        Case(
            "padded, capped, three sets",
            {"N": 17, "D": 32, "V": 256, "W": 3},
            {"num_real": 250, "softcap": 15.0},
        ),
        Case("strided", {"N": 21, "D": 32, "V": 129, "W": 2}, {"softcap": 5.0}, strided=True),
        Case("rescaled", {"N": 19, "D": 32, "V": 131, "W": 2}, {"rescale": (23.0, 5.0, 7.5)}),
        Case("empty", {"N": 0, "D": 32, "V": 129, "W": 2}),
        Case("sampled", {"N": 29, "D": 48, "V": 217, "W": 1}, {"columns": 63}),
        Case(
            "sampled, padded, capped",
            {"N": 17, "D": 32, "V": 256, "W": 3},
            {"num_real": 250, "softcap": 15.0, "columns": 130},
        ),
        Case(
            "sampled in stretches",
            {"N": 37, "D": 32, "V": 217, "W": 2},
            {"columns": 63, "sample_tokens": 16},
        ),
        Case("more targets than columns", {"N": 37, "D": 32, "V": 129, "W": 2}, {"columns": 20}),
        Case("sampled, empty", {"N": 0, "D": 32, "V": 129, "W": 2}, {"columns": 40}),
        Case("GPT-2 head", {"N": 65536, "D": 768, "V": 50304, "W": 1}, {"num_real": 50257}, measured=True),
        Case(
            "GPT-2 head, capped, two sets",
            {"N": 65536, "D": 768, "V": 50304, "W": 2},
            {"num_real": 50257, "softcap": 15.0},
            measured=True,
        ),
        Case("odd head", {"N": 20001, "D": 640, "V": 50257, "W": 1}, measured=True),
    ),
    memory_bytes=lambda case, size: size * (2 * case.sizes["N"] + 2 * case.sizes["V"]) * case.sizes["D"],
    flops=lambda case: 6 * case.sizes["N"] * case.sizes["D"] * case.sizes["V"],
    # The gradient is held, and rounded once more where what comes back is no power of two, as here.
    slack=2.5,
)


CROSS_ENTROPY_FP8 = replace(
    CROSS_ENTROPY,
    name="cross_entropy_fp8",
    fused=partial(cross_entropy.cross_entropy_head, fp8=True),
    # e5m2 keeps 6 bits fewer than bf16.
    slack=2 * 2**6,
    cases=tuple(case for case in CROSS_ENTROPY.cases if case.name == "GPT-2 head"),
)


def _residual_norm_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    rows, dim = case.sizes["N"], case.sizes["D"]
    made: dict[str, Any] = {
        name: normal(generator, rows, dim, dtype=dtype, strided=case.strided) for name in ("x_ND", "y_ND")
    }
    for name, middle in (("weight_D", 1), ("bias_D", 0)):
        learned = middle + normal(generator, dim, dtype=dtype, scale=0.1)
        made[name] = learned if case.sizes["weights"] else None
    return made | {"seed": torch.tensor(2**40 + 7, device=generator.device)}


def _residual_norm_rival(
    x_ND: Tensor,
    y_ND: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    *,
    p: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What one would write without the kernel: torch's own dropout, then the reference."""
    return residual_norm.residual_norm_reference(
        x_ND, F.dropout(y_ND, p), weight_D, bias_D, **options | {"seed": None}
    )


RESIDUAL_NORM = Operation(
    name="residual_norm",
    fused=residual_norm.residual_norm,
    plain=residual_norm.residual_norm_reference,
    rival=_residual_norm_rival,
    inputs=_residual_norm_inputs,
    outputs=("r", "n"),
    gradients=("x_ND", "y_ND", "weight_D", "bias_D"),
    cases=(
        Case("odd", {"N": 37, "D": 217, "weights": 0}),
        Case("layer norm", {"N": 19, "D": 63, "weights": 1}, {"kind": "layer"}),
        Case("dropout", {"N": 23, "D": 100, "weights": 1}, {"p": 0.3, "scale": 0.25}),
        Case("strided", {"N": 9, "D": 96, "weights": 0}, {"kind": "layer", "p": 0.5}, strided=True),
        Case("empty", {"N": 0, "D": 64, "weights": 1}, {"p": 0.1}),
        Case("GPT-2 stream", {"N": 65536, "D": 768, "weights": 0}, measured=True),
        Case(
            "LayerNorm, dropout",
            {"N": 65536, "D": 768, "weights": 1},
            {"kind": "layer", "p": 0.1},
            measured=True,
        ),
        Case("odd stream", {"N": 20001, "D": 1000, "weights": 1}, measured=True),
    ),
    memory_bytes=lambda case, size: (
        size * case.sizes["N"] * case.sizes["D"] * (9 if case.options.get("p") else 8)
    ),
    flops=lambda case: 0,
)


def _linear_activation_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    tokens, dim, wide = (case.sizes[name] for name in ("N", "D", "F"))
    shapes = {"x_ND": (tokens, dim, 1.0), "up_FD": (wide, dim, dim**-0.5), "down_DF": (dim, wide, wide**-0.5)}
    return {
        name: normal(generator, rows, columns, dtype=dtype, scale=scale, strided=case.strided)
        for name, (rows, columns, scale) in shapes.items()
    }


LINEAR_ACTIVATION = Operation(
    name="linear_activation",
    fused=_alone(linear_activation.perceptron),
    plain=_alone(linear_activation.perceptron_reference),
    inputs=_linear_activation_inputs,
    outputs=("y",),
    gradients=("x_ND", "up_FD", "down_DF"),
    cases=(
        Case("odd", {"N": 63, "D": 40, "F": 217}),
        Case("odd, GELU", {"N": 131, "D": 33, "F": 150}, {"activation": "gelu"}),
        Case("strided", {"N": 24, "D": 32, "F": 96}, {"activation": "gelu"}, strided=True),
        Case("whole tiles", {"N": 128, "D": 64, "F": 256}),
        Case("empty", {"N": 0, "D": 32, "F": 64}),
        Case("GPT-2 perceptron", {"N": 65536, "D": 768, "F": 3072}, measured=True),
        Case(
            "GPT-2 perceptron, GELU", {"N": 65536, "D": 768, "F": 3072}, {"activation": "gelu"}, measured=True
        ),
        Case("odd perceptron", {"N": 20001, "D": 1000, "F": 2728}, measured=True),
    ),
    memory_bytes=lambda case, size: (
        size
        * (
            case.sizes["N"] * (4 * case.sizes["D"] + 4 * case.sizes["F"])
            + 6 * case.sizes["D"] * case.sizes["F"]
        )
    ),
    flops=lambda case: 12 * case.sizes["N"] * case.sizes["D"] * case.sizes["F"],
)


def _symmetric_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    shape = tuple(case.sizes[name] for name in ("S", "M", "K"))
    a_SMK = normal(generator, *shape, dtype=dtype, scale=case.sizes["K"] ** -0.5, strided=case.strided)
    addend_SMM = normal(generator, *shape[:2], shape[1], dtype=dtype) if "beta" in case.options else None
    symmetric_SMM = None if addend_SMM is None else addend_SMM + addend_SMM.mT
    return {"a_SMK": a_SMK, "addend_SMM": symmetric_SMM}


# The matrices of twelve GPT-2 layers, square and wide.
SQUARE, RECTANGLE = {"S": 48, "M": 768, "K": 768}, {"S": 24, "M": 768, "K": 3072}

SYMMETRIC_PRODUCT = Operation(
    name="symmetric_product",
    fused=_alone(symmetric_product.symmetric_product),
    plain=_alone(symmetric_product.symmetric_product_reference),
    inputs=_symmetric_inputs,
    outputs=("product",),
    gradients=(),
    cases=(
        Case("odd", {"S": 2, "M": 67, "K": 43}, {"alpha": 2.0, "beta": -0.5}),
        Case("several tiles", {"S": 1, "M": 270, "K": 64}),
        Case("strided", {"S": 2, "M": 33, "K": 48}, strided=True),
        Case("empty", {"S": 0, "M": 32, "K": 32}),
        Case("Gram matrix, wide", RECTANGLE, measured=True),
        Case("polynomial", SQUARE, {"alpha": 2.0315, "beta": -4.775}, measured=True),
    ),
    memory_bytes=lambda case, size: (
        size
        * case.sizes["S"]
        * case.sizes["M"]
        * (case.sizes["K"] + case.sizes["M"] * (1 + len(case.options) // 2))
    ),
    # Half of a full product's: the other half is its transpose.
    flops=lambda case: case.sizes["S"] * case.sizes["M"] ** 2 * case.sizes["K"],
)


def _orthogonalise(product: Callable[..., Tensor], *, x_SMK: Tensor, rounds: int) -> tuple[Tensor]:
    """Rounds of the quintic of Muon with its two symmetric products made by `product`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(rounds):
        gram_SMM = product(x_SMK)
        polynomial_SMM = product(gram_SMM, gram_SMM, alpha=c, beta=b)
        x_SMK = torch.baddbmm(x_SMK, polynomial_SMM, x_SMK, beta=a)
    return (x_SMK,)


def _orthogonalise_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    count, rows, columns = (case.sizes[name] for name in ("S", "M", "K"))
    scale = (rows * columns) ** -0.5
    return {"x_SMK": normal(generator, count, rows, columns, dtype=dtype, scale=scale)}


ORTHOGONALISATION = Operation(
    name="orthogonalisation",
    fused=partial(_orthogonalise, symmetric_product.symmetric_product),
    plain=partial(_orthogonalise, symmetric_product.symmetric_product_reference),
    inputs=_orthogonalise_inputs,
    outputs=("x",),
    gradients=(),
    cases=(
        Case("odd", {"S": 2, "M": 35, "K": 67}, {"rounds": 2}),
        Case("twelve layers, square", SQUARE, {"rounds": 5}, measured=True),
        Case("twelve layers, wide", RECTANGLE, {"rounds": 5}, measured=True),
    ),
    memory_bytes=lambda case, size: size * 2 * case.sizes["S"] * case.sizes["M"] * case.sizes["K"],
    flops=lambda case: (
        case.options["rounds"]
        * case.sizes["S"]
        * (3 * case.sizes["M"] ** 2 * case.sizes["K"] + case.sizes["M"] ** 3)
    ),
)


def _grouped_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Groups of random sizes; where there are more than two, the second one is empty."""
    rows, dim, wide, experts = (case.sizes[name] for name in ("M", "D", "O", "E"))
    device = generator.device
    numbers_M = torch.randint(0, experts, (rows,), generator=generator, device=device)
    if experts > 2:
        numbers_M = numbers_M.masked_fill(numbers_M == 1, 0)
    load_E = (numbers_M[:, None] == torch.arange(experts, device=device)).sum(0)
    return {
        "x_MD": normal(generator, rows, dim, dtype=dtype, strided=case.strided),
        "weight_EOD": normal(
            generator, experts, wide, dim, dtype=dtype, scale=dim**-0.5, strided=case.strided
        ),
        "ends_E": load_E.cumsum(0).to(torch.int32),
    }


def _grouped_rival(x_MD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> tuple[Tensor]:
    """torch's own, which like the kernel does not ask the host where it is fast."""
    return (F.grouped_mm(x_MD, weight_EOD.mT, offs=ends_E),)


GROUPED_PRODUCT = Operation(
    name="grouped_product",
    fused=_alone(grouped_product.grouped_product),
    plain=_alone(grouped_product.grouped_product_reference),
    rival=_grouped_rival,
    inputs=_grouped_inputs,
    outputs=("y",),
    gradients=("x_MD", "weight_EOD"),
    cases=(
        Case("odd", {"M": 150, "D": 40, "O": 72, "E": 3}),
        Case("many small groups", {"M": 70, "D": 32, "O": 48, "E": 17}),
        Case("strided", {"M": 64, "D": 32, "O": 64, "E": 2}, strided=True),
        Case("empty", {"M": 0, "D": 32, "O": 48, "E": 4}),
        Case("eight experts, up", {"M": 65536, "D": 768, "O": 3072, "E": 8}, measured=True),
        Case("eight experts, down", {"M": 65536, "D": 3072, "O": 768, "E": 8}, measured=True),
        Case("64 small experts, 4 active", {"M": 262144, "D": 768, "O": 768, "E": 64}, measured=True),
    ),
    memory_bytes=lambda case, size: (
        size
        * 3
        * (
            case.sizes["M"] * (case.sizes["D"] + case.sizes["O"])
            + case.sizes["E"] * case.sizes["D"] * case.sizes["O"]
        )
    ),
    flops=lambda case: 6 * case.sizes["M"] * case.sizes["D"] * case.sizes["O"],
)


OPERATIONS = (
    CROSS_ENTROPY,
    CROSS_ENTROPY_FP8,
    RESIDUAL_NORM,
    LINEAR_ACTIVATION,
    SYMMETRIC_PRODUCT,
    ORTHOGONALISATION,
    ROTARY_NORM,
    SPAN_ATTENTION,
    GROUPED_PRODUCT,
    PAGED_LATENT,
    PAGED_ATTENTION,
)
