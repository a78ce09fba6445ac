"""The fused kernels, each a part on the study base; the plain parts compute the same up to rounding.

The training losses of `sampled-head` and `sampled-head-counts` are estimates.
"""

from sabrage.attention.multi_head import MultiHead
from sabrage.feedforward.fused_mlp import FusedMlp
from sabrage.model.fused_head import FusedHead
from sabrage.recipes.base import variant
from sabrage.wiring.fused_residual import FusedResidual
from sabrage.wiring.residual import Residual

HEAD = FusedHead()
ROTARY = (MultiHead(heads=12, qk_norm=True, zero_init=True, rotary_backend="auto"),)
MLP = (FusedMlp(zero_init=True),)


fused = (
    variant("fused-head", "base with the cross-entropy head in chunks", head=HEAD),
    variant(
        "sampled-head",
        "fused-head that trains on 16,384 columns: all targets and a sample of the other tokens",
        head=FusedHead(columns=16384),
    ),
    variant(
        "sampled-head-counts",
        "sampled-head on all targets of 16,384 tokens, and others drawn by their counts so far",
        head=FusedHead(columns=16_384, sample_tokens=16_384, proposal="counts"),
    ),
    variant("fused-mlp", "base with linear + ReLU^2 fused", feedforwards=MLP),
    variant(
        "fp8-gradients",
        "fused-mlp whose gradient of the input is made by FP8 products, on Hopper",
        feedforwards=(FusedMlp(zero_init=True, fp8_gradients=True),),
    ),
    variant(
        "fp8-mlp",
        "fp8-gradients with the two products of the forward pass in FP8 as well, on Hopper",
        feedforwards=(FusedMlp(zero_init=True, fp8_gradients=True, fp8_forward=True),),
    ),
    variant(
        "fused-rotary",
        "base with QK-norm + rotary in one pass",
        mixers=ROTARY,
    ),
    variant("fused-norm", "base with residual + norm in one pass", wiring=FusedResidual(mixer_scale="depth")),
    variant(
        "fused-norm-dropout",
        "base with residual + dropout 0.1 + norm in one pass",
        wiring=FusedResidual(mixer_scale="depth", dropout=0.1),
    ),
    variant(
        "plain-dropout",
        "base with dropout 0.1, for comparison with fused-norm-dropout",
        wiring=Residual(mixer_scale="depth", dropout=0.1),
    ),
)
