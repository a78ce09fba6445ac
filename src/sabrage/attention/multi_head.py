"""Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions.

q, k, v = x W_qkv (one product, split in that order), y = concat_h(attend(q_h, k_h, v_h)) W_out.
Biases are left out. `qk_norm` normalises queries and keys per head before the rotation
(Henry et al. 2020, arXiv 2010.04245).
"""

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor, nn

from sabrage.attention.backends import CUDA_KERNELS, Backend, attend, choose_backend, fused_refusal
from sabrage.attention.rotary import Rotary
from sabrage.context import Context
from sabrage.linear import Linear
from sabrage.norms import rms_norm
from sabrage.parts import Mixer
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class MultiHead(Mixer):
    """Attention with as many key/value heads as query heads.

    `zero_init` starts the output projection at zero, so that a fresh block adds nothing.
    """

    heads: int
    rotary: Rotary | None = field(default_factory=Rotary)
    qk_norm: bool = False
    zero_init: bool = False
    backend: Backend = "auto"

    def build(self, *, dim: int, layer: int) -> nn.Module:
        if self.heads < 1 or dim % (2 * self.heads):
            fits = [count for count in range(1, dim // 2 + 1) if dim % (2 * count) == 0]
            near = sorted(sorted(fits, key=lambda count: abs(count - self.heads))[:3])
            raise ValueError(
                f"mixer.heads={self.heads} does not cut dim={dim} into heads of even width; "
                f"use {', '.join(map(str, near)) or 'an even dim'}"
            )
        return MultiHeadAttention(self, dim=dim, layer=layer)

    def refusal(self, facts: DeviceFacts) -> str | None:
        return fused_refusal(self.backend, facts) if self.backend in CUDA_KERNELS else None

    def resolve(self, facts: DeviceFacts) -> Self:
        return replace(self, backend=choose_backend(self.backend, facts))

    def streams(self, dim: int) -> dict[str, int]:
        return {"key": dim, "value": dim}

    def flops(self, dim: int, sequence_length: int) -> int:
        projections = 2 * 4 * dim * dim
        return projections + 2 * 2 * dim * (sequence_length + 1) // 2


class MultiHeadAttention(nn.Module):
    """The module of `MultiHead`: forward(x_BTD, context) -> y_BTD."""

    def __init__(self, part: MultiHead, *, dim: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.backend, self.qk_norm = part.heads, layer, part.backend, part.qk_norm
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        if part.zero_init:
            nn.init.zeros_(self.out.weight)
        self.rotary = part.rotary.build(dim // part.heads) if part.rotary else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        batch, length, dim = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(batch, length, 3, self.heads, dim // self.heads).unbind(2)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, context.positions_BT), self.rotary(k, context.positions_BT)
        if context.cache is not None:
            cached = context.cache.extend(self.layer, key=k.flatten(2), value=v.flatten(2))
            k, v = (cached[name].unflatten(2, (self.heads, -1)) for name in ("key", "value"))
        y_BTHK = attend(q, k, v, context, backend=self.backend)
        return self.out(y_BTHK.flatten(2))
