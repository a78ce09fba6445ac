"""Every kernel as training would launch it on a GPT-2-sized model: what `offline` compiles."""

from dataclasses import dataclass
from typing import Any

import torch

from sabrage.kernels import (
    cross_entropy_rows,
    grouped_product,
    linear_activation,
    narrow_forward,
    narrow_gradients,
    paged_attention,
    paged_latent,
    residual_norm,
    rotary_norm,
    span_attention,
    split,
    symmetric_product,
)
from sabrage.kernels.tiles import GROUP


@dataclass(frozen=True)
class Build:
    """One offline compilation: argument types, constants, and the options of the launch.

    `max_registers` and `max_spills` (a thread) are what the kernel's design allows. Types are Triton's
    ("*bf16", "i32"); "i32:16" is a multiple of 16, as every pointer is taken to be.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int
    max_spills: int = 0


def _cross_entropy(capability: tuple[int, int]) -> list[Build]:
    types = {"logits": "*bf16", "narrow": "*bf16", "targets": "*i64", "coefficients": "*fp32"}
    types |= {
        "narrow_scale": "*fp32",
        "nll": "*fp32",
        "num_real": "i32",
        "height": "fp32",
        "shift": "fp32",
        "width": "fp32",
        "stride": "i32:16",
    }
    constants = {
        "SETS": 2,
        "BLOCK_SETS": 2,
        "BOUNDED": True,
        "LOW": True,
        "LEARNS": True,
        "NARROW": False,
        "SAMPLED": False,
        "BLOCK": cross_entropy_rows.BLOCK,
    }
    sampled = constants | {"SAMPLED": True}
    kinds = {
        "": constants,
        ", high bound": constants | {"LOW": False},
        ", no bound": constants | {"LOW": False, "BOUNDED": False},
        ", sampled": sampled,
        ", sampled, no bound": sampled | {"LOW": False, "BOUNDED": False},
    }
    if capability >= (8, 9):
        kinds[", FP8"] = constants | {"NARROW": True}
        kinds[", sampled, FP8"] = sampled | {"NARROW": True}
    return [
        Build(
            f"cross-entropy rows{kind}",
            cross_entropy_rows.rows,
            types
            | {"narrow": "*fp8e5" if own["NARROW"] else "*bf16"}
            | {"sample": "*fp16" if own["SAMPLED"] else "*bf16"},
            own,
            cross_entropy_rows.NUM_WARPS,
            3,
            max_registers=64,
            # One number, on Hopper, of the form that no recipe uses.
            max_spills=2 if kind == ", sampled, no bound" else 0,
        )
        for kind, own in kinds.items()
    ]


def _residual_norm(capability: tuple[int, int]) -> list[Build]:
    forward = dict.fromkeys(("x", "y", "weight", "bias", "r_out", "n_out"), "*bf16") | {"seed": "*i64"}
    backward = dict.fromkeys(("grad_r", "grad_n", "r_in", "weight", "grad_x", "grad_y"), "*bf16")
    backward |= {"seed": "*i64", "sums": "*fp32", "rows": "i32"}
    numbers = {"dim": "i32:16", "eps": "fp32", "threshold": "i32", "factor": "fp32"}
    constants = {"LAYER": True, "WEIGHT": True, "DROPS": True, "BLOCK": residual_norm._block(768)}
    warps = residual_norm._num_warps(residual_norm._block(768))
    return [
        Build(
            "residual norm",
            residual_norm._forward_rows,
            forward | numbers,
            constants | {"BIAS": True},
            warps,
            3,
            64,
        ),
        Build(
            "residual norm, back",
            residual_norm._backward_rows,
            backward | numbers,
            constants | {"OWN": True},
            warps,
            3,
            96,
        ),
    ]


def _product_build(capability: tuple[int, int], epilogue: str, *, second: bool) -> Build:
    tile = linear_activation.tile_for(capability, torch.bfloat16, epilogue)
    types = dict.fromkeys(("a", "b", "out", "second", "kept"), "*bf16")
    types |= dict.fromkeys(("M", "N", "K"), "i32:16")
    constants = {"EPILOGUE": epilogue, "SECOND": second, "EVEN": True, "PRECISION": "tf32"}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP}
    kernel = linear_activation._product
    return Build(f"product, {epilogue}", kernel, types, constants, tile.num_warps, tile.num_stages, 192)


def _linear_activation(capability: tuple[int, int]) -> list[Build]:
    forward = [("relu_squared", False), ("gelu", True)]
    found = [
        _product_build(capability, name + way, second=kept) for name, kept in forward for way in ("", "_back")
    ]
    if capability == (9, 0):
        found += [_mapped_product_build(back=back) for back in (False, True)]
    return found


def _mapped_product_build(*, back: bool) -> Build:
    tile = linear_activation.MAPPED_TILE
    b, half = (tile.k, tile.n) if back else (tile.n, tile.k), (tile.m, tile.n // 2)
    boxes = {"a": (tile.m, tile.k), "b": b, "out": half, "kept": half}
    types = {name: f"tensordesc<bf16[{rows},{columns}]>" for name, (rows, columns) in boxes.items()}
    types |= dict.fromkeys(("M", "N", "K"), "i32:16")
    constants = {"BACK": back, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    constants |= {"GROUP": GROUP, "PROGRAMS": 132}
    name, kernel = f"mapped product{', back' if back else ''}", linear_activation._mapped_product
    return Build(name, kernel, types, constants, tile.num_warps, tile.num_stages, 255)


def _narrow(capability: tuple[int, int]) -> list[Build]:
    if capability != (9, 0):
        return []
    found = []
    for name, room, left in (
        ("narrow gradients", narrow_gradients, "fp8e5"),
        ("narrow forward", narrow_forward, "fp8e4nv"),
    ):
        tile = room.TILE
        half = f"{tile.m},{tile.n // 2}"
        types = {"a": f"tensordesc<{left}[{tile.m},{tile.k}]>"}
        types |= {"b": f"tensordesc<fp8e4nv[{tile.n},{tile.k}]>", "narrow": f"tensordesc<{left}[{half}]>"}
        types |= {"out": f"tensordesc<bf16[{half}]>"} | dict.fromkeys(("M", "N", "K"), "i32:16")
        scales = ("scales",) if room is narrow_gradients else ("tokens", "up_scale", "post_scale")
        types |= dict.fromkeys(scales, "*fp32")
        types |= {"kept": f"tensordesc<bf16[{half}]>"} if room is narrow_gradients else {}
        constants: dict[str, Any] = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        constants |= {"GROUP": GROUP, "LARGEST": room.LARGEST, "PROGRAMS": 132}
        kernel, warps, stages = room._mapped_product, tile.num_warps, tile.num_stages
        found.append(Build(name, kernel, types, constants, warps, stages, 255))
    return found


def _symmetric(capability: tuple[int, int]) -> list[Build]:
    tile = symmetric_product.tile_for(capability, torch.bfloat16)
    types = dict.fromkeys(("a", "addend", "out"), "*bf16") | {"alpha": "fp32", "beta": "fp32"}
    types |= dict.fromkeys(("M", "K", "stride_s", "stride_m"), "i32:16")
    constants = {"stride_k": 1, "ADDEND": True, "EVEN": True, "PRECISION": "tf32"}
    constants |= {"BLOCK_M": tile.m, "BLOCK_K": tile.k}
    kernel = symmetric_product._tiles
    return [Build("symmetric product", kernel, types, constants, tile.num_warps, tile.num_stages, 192)]


def _rotary(capability: tuple[int, int]) -> list[Build]:
    types = dict.fromkeys(("x", "q", "k", "v", "addend", "back"), "*bf16")
    types |= {"cosine": "*fp32", "sine": "*fp32", "eps": "fp32", "heads": "i32"}
    types |= dict.fromkeys(("rows", "time", "x_batch", "x_time", "x_head"), "i32:16")
    constants = {"HALF": 64, "ADDS": True, "ROWS": rotary_norm.ROWS, "BLOCK": 64}
    return [
        Build(
            f"rotary norm{', back' if back else ''}",
            rotary_norm._heads,
            types,
            constants | {"BACK": back},
            rotary_norm.NUM_WARPS,
            3,
            128,
        )
        for back in (False, True)
    ]


def _spans(capability: tuple[int, int]) -> list[Build]:
    types = dict.fromkeys(("q", "k", "v", "grad", "out", "grad_q", "grad_k", "grad_v"), "*bf16")
    types |= dict.fromkeys(("lse", "delta"), "*fp32") | dict.fromkeys(("starts", "ends"), "*i32")
    types |= {f"{each}_{axis}": "i32:16" for each in "qkvg" for axis in ("batch", "time", "head")}
    types |= {"time": "i32:16", "heads": "i32", "scale": "fp32", "plain_scale": "fp32"}
    tiles, room = span_attention.tiles_for(capability, torch.bfloat16), span_attention
    kernels = {"outputs": tiles.forward, "queries": tiles.queries, "keys": tiles.keys}
    found = []
    for name, tile in kernels.items():
        kernel = getattr(room, f"_{name}")
        constants = room._constants(tile, 2048, 128, torch.bfloat16) | {"SPAN": room.SPAN}
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        wanted = set(getattr(kernel, "arg_names", ()))
        own_types, own = ({key: each[key] for key in each if key in wanted} for each in (types, constants))
        found.append(Build(f"span attention, {name}", kernel, own_types, own, warps, stages, 255))
    return found


def _grouped(capability: tuple[int, int]) -> list[Build]:
    tile = grouped_product.tile_for(capability, torch.bfloat16)
    constants = {"EVEN": True, "PRECISION": "tf32"}
    rows = dict.fromkeys(("x", "weight", "out"), "*bf16") | {"ends": "*i32", "tiles_m": "i32"}
    rows |= {"N": "i32:16", "K": "i32:16", "experts": "i32"}
    sizes = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "EXPERTS": 8}
    sums = dict.fromkeys(("a", "b", "out"), "*bf16") | {"ends": "*i32", "N": "i32:16", "K": "i32:16"}
    return [
        *(
            Build(
                f"grouped product{', back' if back else ''}",
                grouped_product._rows,
                rows,
                constants | sizes | {"BACK": back, "GROUP": GROUP},
                tile.num_warps,
                tile.num_stages,
                192,
            )
            for back in (False, True)
        ),
        Build(
            "grouped product, gradient of weights",
            grouped_product._sums,
            sums,
            constants | {"BLOCK_N": tile.m, "BLOCK_K": tile.n, "BLOCK_M": tile.k},
            tile.num_warps,
            tile.num_stages,
            192,
        ),
    ]


# What every paged kernel is given; a decoding batch of 64.
PAGED = {
    **dict.fromkeys(("table", "lengths"), "*i32"),
    **dict.fromkeys(("lse", "partial", "partial_lse"), "*fp32"),
    **dict.fromkeys(("batch", "queries", "parts", "window"), "i32"),
}
PAGED_CONSTANTS = {"CAUSAL": True, "BLOCK_B": 64, "PAGE": 64, "PRECISION": "tf32"}


def _paged_latent(capability: tuple[int, int]) -> list[Build]:
    types = PAGED | dict.fromkeys(("q", "pages", "out"), "*bf16")
    types |= {"heads": "i32", "table_width": "i32", "page_stride": "i32:16", "scale": "fp32"}
    tiles = paged_latent.tiles_for(capability, torch.bfloat16)
    found = []
    for value, rotary, rows in (*((512, 64, rows) for rows in tiles), (64, 16, 16)):
        tile = tiles[rows]
        constants = PAGED_CONSTANTS | {"STRIDE": value + rotary, "LEFT": value // 2, "RIGHT": value // 2}
        constants |= {"ROTARY": rotary, "BLOCK_L": value // 2, "BLOCK_R": rotary}
        constants |= {"ROWS": tile.rows, "ENTRIES": tile.entries}
        # Hopper's accumulator of 64 rows leaves too few registers for the addresses of so many operands.
        spills = 200 if value == 512 and tile.rows == 64 else 0
        name, kernel = f"paged latent {value}+{rotary}, {rows} rows", paged_latent._parts
        found.append(Build(name, kernel, types, constants, tile.num_warps, tile.num_stages, 255, spills))
    return found


def _paged_attention(capability: tuple[int, int]) -> list[Build]:
    types = PAGED | dict.fromkeys(("q", "keys", "values", "out"), "*bf16")
    types |= {"heads": "i32", "table_width": "i32", "scale": "fp32"}
    types |= {"key_page": "i32:16", "value_page": "i32:16"}
    found = []
    for rows, tile in paged_attention.TILES.items():
        constants = PAGED_CONSTANTS | {"GROUPS": 8, "ROWS": tile.rows, "ENTRIES": tile.entries}
        constants |= dict.fromkeys(("KEY", "VALUE", "BLOCK_K", "BLOCK_V"), 128)
        constants |= dict.fromkeys(("KEY_STRIDE", "VALUE_STRIDE"), 8 * 128)
        name, kernel = f"paged attention 128, {rows} rows", paged_attention._parts
        found.append(Build(name, kernel, types, constants, tile.num_warps, tile.num_stages, 255))
    return found


def _combination(capability: tuple[int, int]) -> list[Build]:
    types = {name: kind for name, kind in PAGED.items() if name != "table"} | {"out": "*bf16", "rows": "i32"}
    constants = {"CAUSAL": True, "BLOCK_B": 64, "ENTRIES": 64, "WIDTH": 512, "BLOCK_V": 512}
    return [Build("combination", split._combine, types, constants, split.COMBINE_WARPS, 3, max_registers=64)]


def builds(capability: tuple[int, int]) -> list[Build]:
    """Every kernel as training would launch it on a GPT-2-sized model."""
    makers = (
        _cross_entropy,
        _residual_norm,
        _linear_activation,
        _narrow,
        _symmetric,
        _rotary,
        _spans,
        _grouped,
        _paged_latent,
        _paged_attention,
        _combination,
    )
    return [build for maker in makers for build in maker(capability)]
