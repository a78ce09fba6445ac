"""The paged decoding operations with their cases, for `catalogue`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sabrage.kernels import paged_attention, paged_latent
from sabrage.kernels.cases import Case, Operation, normal

PAGE = 64


def scattered_pages(
    lengths: Sequence[int], widths: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> list[Tensor]:
    """[pages of each width, table, lengths] of a cache with pages in any order and NaN wherever nothing is.

    A page more than the table names is there, and holds NaN alone.
    """
    device, batch = generator.device, len(lengths)
    lengths_B = torch.tensor(lengths, device=device, dtype=torch.int32)
    per_sequence = max(1, -(-max(lengths, default=0) // PAGE))
    order = torch.randperm(batch * per_sequence + 1, generator=generator, device=device)
    table_BN = order[1:].view(batch, per_sequence)
    entry_NS = torch.arange(per_sequence * PAGE, device=device).view(per_sequence, PAGE)
    used_PS = torch.zeros(len(order), PAGE, dtype=torch.bool, device=device)
    used_PS[table_BN] = entry_NS < lengths_B[:, None, None]
    pages = [
        normal(generator, len(order), PAGE, width, dtype=dtype).masked_fill_(~used_PS[..., None], math.nan)
        for width in widths
    ]
    return [*pages, table_BN.int(), lengths_B]


def _lengths(case: Case) -> list[int]:
    """From S down to 0, evenly; S alone for one sequence."""
    batch, most = case.sizes["B"], case.sizes["S"]
    return [most - index * most // max(1, batch - 1) for index in range(batch)]


def _queries(case: Case, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return normal(generator, *(case.sizes[name] for name in ("B", "T", "H", "K")), dtype=dtype)


def _finite(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function with 0 for the log-sum-exp of nothing: errors of infinities cannot be compared."""

    def found(**arguments: Any) -> tuple[Tensor, Tensor]:
        out_BTHV, lse_BTH = function(**arguments)
        return out_BTHV, lse_BTH.masked_fill(lse_BTH == -math.inf, 0)

    return found


def _latent_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    pages_PSK, table_BN, lengths_B = scattered_pages(_lengths(case), (case.sizes["K"],), generator, dtype)
    return {
        "q_BTHK": _queries(case, generator, dtype),
        "pages_PSK": pages_PSK,
        "block_table": table_BN,
        "lengths": lengths_B,
        "value_width": case.sizes["V"],
        "scale": case.sizes["K"] ** -0.5,
    }


PAGED_LATENT = Operation(
    name="paged_latent",
    fused=_finite(paged_latent.decode),
    plain=_finite(paged_latent.decode_reference),
    inputs=_latent_inputs,
    outputs=("out", "lse"),
    gradients=(),
    cases=(
        Case("odd", {"B": 3, "S": 77, "T": 2, "H": 5, "K": 80, "V": 64}),
        Case("several row tiles", {"B": 2, "S": 130, "T": 3, "H": 9, "K": 48, "V": 32}, {"causal": False}),
        Case("no rotary, window", {"B": 4, "S": 150, "T": 1, "H": 3, "K": 40, "V": 40}, {"window": 33}),
        Case("empty", {"B": 0, "S": 64, "T": 1, "H": 4, "K": 48, "V": 32}),
        Case("16 heads", {"B": 128, "S": 8192, "T": 1, "H": 16, "K": 576, "V": 512}, measured=True),
        Case(
            "128 heads, 2 queries", {"B": 64, "S": 8192, "T": 2, "H": 128, "K": 576, "V": 512}, measured=True
        ),
    ),
    memory_bytes=lambda case, size: (
        size
        * (
            sum(_lengths(case)) * case.sizes["K"]
            + case.sizes["B"] * case.sizes["T"] * case.sizes["H"] * (case.sizes["K"] + case.sizes["V"])
        )
    ),
    flops=lambda case: (
        2 * sum(_lengths(case)) * case.sizes["T"] * case.sizes["H"] * (case.sizes["K"] + case.sizes["V"])
    ),
)


def _heads_inputs(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    widths = (case.sizes["G"] * case.sizes["K"], case.sizes["G"] * case.sizes["V"])
    keys_PSX, values_PSX, table_BN, lengths_B = scattered_pages(_lengths(case), widths, generator, dtype)
    return {
        "q_BTHK": _queries(case, generator, dtype),
        "key_pages_PSX": keys_PSX,
        "value_pages_PSX": values_PSX,
        "table_BN": table_BN,
        "lengths_B": lengths_B,
        "scale": case.sizes["K"] ** -0.5,
    }


PAGED_ATTENTION = Operation(
    name="paged_attention",
    fused=_finite(paged_attention.decode_heads),
    plain=_finite(paged_attention.decode_heads_reference),
    inputs=_heads_inputs,
    outputs=("out", "lse"),
    gradients=(),
    cases=(
        Case("odd, grouped", {"B": 3, "S": 77, "T": 2, "H": 6, "G": 2, "K": 22, "V": 18}),
        Case("every head its own", {"B": 2, "S": 130, "T": 1, "H": 3, "G": 3, "K": 32, "V": 32}),
        Case(
            "several row tiles, window",
            {"B": 2, "S": 150, "T": 3, "H": 14, "G": 2, "K": 16, "V": 16},
            {"window": 50},
        ),
        Case("empty", {"B": 0, "S": 64, "T": 1, "H": 4, "G": 2, "K": 32, "V": 32}),
        Case(
            "8 of 32 heads", {"B": 128, "S": 8192, "T": 1, "H": 32, "G": 8, "K": 128, "V": 128}, measured=True
        ),
        Case("GPT-2 heads", {"B": 128, "S": 2048, "T": 1, "H": 12, "G": 12, "K": 64, "V": 64}, measured=True),
    ),
    memory_bytes=lambda case, size: (
        size
        * (case.sizes["K"] + case.sizes["V"])
        * (sum(_lengths(case)) * case.sizes["G"] + case.sizes["B"] * case.sizes["T"] * case.sizes["H"])
    ),
    flops=lambda case: (
        2 * sum(_lengths(case)) * case.sizes["T"] * case.sizes["H"] * (case.sizes["K"] + case.sizes["V"])
    ),
)
