"""Copying: attention over the document whose values are the head's own rows.

    y_t = s 2 sigmoid(g . h_t) sum_(j <= t) softmax_j(b cos(W_q h_t, W_k h_(j-1))) norm(W_head[token j])

A state asks for earlier states like itself and gets the tokens that followed them, as vectors that raise the
logits of just these tokens. So a token that has never been copied before is copied as well as any other;
through ordinary values a network has to learn the way from each token's value to its row of the head. It is a
pointer (Vinyals et al. 2015, arXiv 1506.03134; with a head beside it Merity et al. 2016, arXiv 1609.07843)
that adds to logits instead of mixing probabilities, over the keys of a continuous cache (Grave et al. 2017,
arXiv 1612.04426), which are learned here. The head learns nothing from being copied. s starts at zero, and
nothing changes.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from sabrage.attention.backends import Backend, Need, attend, choose_backend, needs_of, refusal
from sabrage.attention.key_offset import offset_keys
from sabrage.context import Context
from sabrage.hashing import DIGIT, digits, number
from sabrage.linear import Linear, opened
from sabrage.norms import rms_norm
from sabrage.parts import Mixer
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Copying(Mixer):
    """For `model.last`. Queries and keys are `head_width` wide, which divides the model's width; `sharpness`
    is b. It caches `head_width` + 2 numbers a token.
    """

    head_width: int = 128
    sharpness: float = 20.0
    backend: Backend = "auto"

    def problems(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be above 0"
            for name in ("head_width", "sharpness")
            if getattr(self, name) <= 0
        ]

    def build(self, *, dim: int, layer: int) -> nn.Module:
        if dim % self.head_width:
            raise ValueError(f"head_width={self.head_width} does not divide dim={dim}; use a divisor")
        return CopyingAttention(self, dim=dim, layer=layer)

    def streams(self, dim: int) -> dict[str, int]:
        return {"copy_key": self.head_width, "copied": 2}

    def flops(self, dim: int, sequence_length: int) -> int:
        """Every slice of a value attends by itself, by the same queries and keys."""
        return 2 * 2 * dim * self.head_width + 2 * 2 * dim * (sequence_length + 1) // 2

    def needs(self, facts: DeviceFacts) -> frozenset[Need]:
        return needs_of(documents=facts.documents)

    def refusal(self, facts: DeviceFacts) -> str | None:
        return refusal(self.backend, facts, self.needs(facts), width=self.head_width)

    def resolve(self, facts: DeviceFacts) -> Self:
        chosen = choose_backend(self.backend, facts, self.needs(facts), width=self.head_width)
        return replace(self, backend=chosen)


class CopyingAttention(nn.Module):
    """The module of `Copying`: forward(h_BTD, context) -> y_BTD; the context has the tokens and the head."""

    def __init__(self, part: Copying, *, dim: int, layer: int) -> None:
        super().__init__()
        self.part, self.layer = part, layer
        self.query, self.key = Linear(dim, part.head_width), Linear(dim, part.head_width)
        self.scale = nn.Parameter(torch.zeros(1))
        # Not called a weight, so that optimizers of matrices leave it alone.
        self.gate_D = nn.Parameter(torch.zeros(dim))

    def forward(self, h_BTD: Tensor, context: Context) -> Tensor:
        assert context.tokens_BT is not None, "copying needs the tokens"
        assert context.head_VD is not None, "copying is for model.last, which is told of the head"
        width = self.part.head_width
        q_BTK, k_BSK = rms_norm(self.query(h_BTD)), rms_norm(self.key(h_BTD))
        # attend() divides by the root of the width; q . k is the width times the cosine.
        q_BTK = q_BTK * (self.part.sharpness * width**-0.5)
        copied_BS = context.tokens_BT
        if context.cache is not None:
            assert len(context.head_VD) < DIGIT**2, "tokens are cached as two digits"
            new = {"copy_key": k_BSK, "copied": digits(copied_BS)}
            cached = context.cache.extend(self.layer, **new)
            k_BSK = cached["copy_key"].to(q_BTK.dtype)
            # Undefined entries are masked; they must only be some token.
            copied_BS = (number(cached["copied"]) - 1).clamp(0, len(context.head_VD) - 1)
        k_BSHK = offset_keys(k_BSK[:, :, None], context, turning=0)
        rows_BSD = nn.functional.embedding(copied_BS, context.head_VD.detach())
        v_BSHK = rms_norm(rows_BSD).to(q_BTK.dtype).unflatten(2, (-1, width))
        # Every slice of the values attends by itself. Copies, since a fused kernel's gradients go by strides.
        shape = -1, -1, v_BSHK.shape[2], -1
        q_BTHK, k_BSHK = q_BTK[:, :, None].expand(shape).contiguous(), k_BSHK.expand(shape).contiguous()
        y_BTHK = attend(q_BTHK, k_BSHK, v_BSHK, context, backend=self.part.backend)
        return (self.scale * opened(h_BTD, self.gate_D)).to(h_BTD.dtype) * y_BTHK.flatten(2).to(h_BTD.dtype)
