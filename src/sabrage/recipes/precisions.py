"""The number formats, each on the study base; `bf16` is what the base itself trains in."""

from dataclasses import replace

from sabrage.parts import Precision
from sabrage.precision.autocast import Bf16, Fp32, Tf32
from sabrage.precision.fp8 import Fp8
from sabrage.precision.fp16 import Fp16
from sabrage.recipe import Recipe
from sabrage.recipes.base import base

HEAD, MLP = r"head$", r"feedforward\.(up|down)$"


def _variant(name: str, summary: str, precision: Precision) -> Recipe:
    return replace(base, name=name, summary=summary, precision=precision)


precisions = (
    _variant("fp32", "base with everything in fp32", Fp32()),
    _variant("tf32", "base with products in TF32", Tf32()),
    _variant("fp16", "base with products in fp16 and dynamic loss scaling", Fp16()),
    _variant("fp16-fast", "fp16 with forward products accumulated in fp16", Fp16(fp16_accumulation=(r".",))),
    _variant("bf16", "base with products in bf16, as base itself", Bf16()),
    _variant("fp8-head", "base with the head's products in FP8", Fp8(products=(HEAD,))),
    _variant("fp8", "base with the head's and the MLP's products in FP8", Fp8(products=(HEAD, MLP))),
)
