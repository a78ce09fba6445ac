"""Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions.

q, k, v = x W_qkv (one product, split in that order), y = concat_h(attend(q_h, k_h, v_h)) W_out.
Biases are left out. `qk_norm` normalises queries and keys per head before the rotation
(Henry et al. 2020, arXiv 2010.04245). Query heads may share key/value heads (Shazeer 2019, arXiv 1911.02150;
Ainslie et al. 2023, arXiv 2305.13245); queries, keys and values then have a matrix each.

More ideas, each off by default: `sabrage.attention.gates` changes a head's output before the projection,
`sabrage.attention.paired` lets heads see each other's keys, `sabrage.attention.key_offset` shifts keys.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from sabrage.attention.backends import Backend, Need, attend, choose_backend, needs_of, refusal
from sabrage.attention.gates import exclusive, gated
from sabrage.attention.key_offset import offset_keys
from sabrage.attention.paired import attend_paired, entries_of
from sabrage.attention.rotary import Rotary
from sabrage.attention.scores import ScorePart
from sabrage.context import Cache, Context
from sabrage.kernels.backend import KernelBackend, choose_kernel, kernel_refusal
from sabrage.kernels.language import refusal as cannot_run
from sabrage.kernels.paged_attention import decode_heads
from sabrage.kernels.rotary_norm import rotary_norm
from sabrage.linear import GATE_WIDTH, Linear
from sabrage.norms import rms_norm
from sabrage.parts import Mixer
from sabrage.run.device import DeviceFacts

# Windows that follow the plan's are whole blocks of this many tokens.
BLOCK = 64
# Of more new tokens the pages are gathered once, and attention is that of a prompt.
FEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class MultiHead(Mixer):
    """Attention of `heads` query heads, which share `kv_heads` key/value heads (0: as many as query heads).

    A layer sees all tokens before it; or `window` tokens, itself included; or the share `window_share` of
    the plan's window, rounded to whole blocks of 64 tokens, at least one. `scores` change the scores in this
    order. `zero_init` starts the output projection at zero, so that a fresh block adds nothing.
    `rotary_backend` "triton" normalises and turns queries and keys in one pass, on CUDA in whole sequences.

    `gate` multiplies each head's output by a gate that starts at 1, `exclusive_self` takes the token's own
    value out of it, `paired` has heads of a pair see each other's keys, and with `key_offset` what does not
    turn of a key is that of the token before, which asks for `rotary.share` below 1.

    Scores are divided by the root of a head's width, or multiplied by `scale`: with `qk_norm` no query can
    be sharper than that allows, and modded-nanogpt's 0.1 to 0.13 for heads of 128 allow more than 0.088.
    """

    heads: int
    kv_heads: int = 0
    rotary: Rotary | None = field(default_factory=Rotary)
    qk_norm: bool = False
    zero_init: bool = False
    window: int | None = None
    window_share: float | None = None
    scores: tuple[ScorePart, ...] = ()
    backend: Backend = "auto"
    rotary_backend: KernelBackend = "plain"
    gate: bool = False
    exclusive_self: bool = False
    paired: bool = False
    key_offset: bool = False
    scale: float | None = None

    def problems(self) -> list[str]:
        found = []
        if self.rotary_backend != "plain" and not (self.qk_norm and self.rotary and not self.kv_heads):
            found.append(
                f"rotary_backend={self.rotary_backend!r} turns queries and keys of one projection that are "
                "normalised first; use qk_norm=true with rotary and kv_heads=0, or rotary_backend=plain"
            )
        if self.scale is not None and self.scale <= 0:
            found.append(f"scale={self.scale} must be above 0; null is the usual one")
        if self.window is not None and self.window < 1:
            found.append(f"window={self.window} must be at least 1; null sees all")
        if self.window_share is not None and self.window_share <= 0:
            found.append(f"window_share={self.window_share} must be above 0; null sees all")
        if self.window is not None and self.window_share is not None:
            found.append(
                f"window={self.window} and window_share={self.window_share} are both set; set one to null"
            )
        if self.key_offset and (self.rotary is None or self.rotary.share == 1):
            found.append("key_offset=true shifts what does not turn of a key; use rotary.share=0.5")
        return found + self.unpaired()

    def unpaired(self) -> list[str]:
        """Sentences about what does not go with pairs of heads."""
        found = []
        if self.paired and (self.heads % 2 or self.groups % 2):
            found.append(
                f"paired=true takes even numbers of heads and key/value heads and got heads={self.heads}, "
                f"kv_heads={self.kv_heads}; use even ones, or paired=false"
            )
        if self.paired and self.scores:
            found.append(
                "paired=true has no scores, which count heads and tokens where pairs have entries; use "
                "scores=[] or paired=false"
            )
        return found

    def build(self, *, dim: int, layer: int) -> nn.Module:
        if self.heads < 1 or dim % (2 * self.heads):
            fits = [count for count in range(1, dim // 2 + 1) if dim % (2 * count) == 0]
            near = sorted(sorted(fits, key=lambda count: abs(count - self.heads))[:3])
            raise ValueError(
                f"mixer.heads={self.heads} does not cut dim={dim} into heads of even width; "
                f"use {', '.join(map(str, near)) or 'an even dim'}"
            )
        if self.kv_heads < 0 or self.heads % self.groups:
            fits = [count for count in range(1, self.heads + 1) if self.heads % count == 0]
            raise ValueError(
                f"mixer.kv_heads={self.kv_heads} does not divide mixer.heads={self.heads}; "
                f"use {', '.join(map(str, fits))}, or 0 for as many"
            )
        return MultiHeadAttention(self, dim=dim, layer=layer)

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    @property
    def windowed(self) -> bool:
        """Whether some step may see less than all."""
        return self.window is not None or self.window_share is not None

    def needs(self, facts: DeviceFacts) -> frozenset[Need]:
        return needs_of(window=self.windowed, documents=facts.documents, scores=bool(self.scores))

    def refusal(self, facts: DeviceFacts) -> str | None:
        told = refusal(self.backend, facts, self.needs(facts), width=self.width(facts))
        return told or kernel_refusal(self.rotary_backend, facts)

    def resolve(self, facts: DeviceFacts) -> Self:
        chosen = choose_backend(self.backend, facts, self.needs(facts), width=self.width(facts))
        return replace(self, backend=chosen, rotary_backend=choose_kernel(self.rotary_backend, facts))

    def width(self, facts: DeviceFacts) -> int | None:
        return facts.dim // self.heads if facts.dim and self.heads else None

    def takes_values(self) -> bool:
        return not self.kv_heads

    def streams(self, dim: int) -> dict[str, int]:
        width = dim // self.heads * self.groups
        return {"key": width, "value": width}

    def flops(self, dim: int, sequence_length: int) -> int:
        """A share of the plan's window counts as all tokens, since the plan may have none."""
        projections = 2 * 2 * dim * (dim + dim // self.heads * self.groups)
        if self.gate:
            projections += 2 * min(GATE_WIDTH, dim) * self.heads
        length, window, width = sequence_length, self.window, dim
        if self.paired:
            # Twice the entries, half the heads.
            length, window, width = 2 * length, window and entries_of(window), dim // 2
        window = min(window or length, length)
        # The first `window` tokens see 1, 2, ... and the others `window` each.
        pairs = window * (window + 1) // 2 + (length - window) * window
        return projections + 2 * 2 * width * pairs // sequence_length

    def window_of(self, context: Context) -> int | None:
        """Tokens that a query sees in this forward pass; None: all before it."""
        if self.window_share is None or context.window is None:
            return self.window
        return max(round(self.window_share * context.window / BLOCK), 1) * BLOCK


class MultiHeadAttention(nn.Module):
    """The module of `MultiHead`: forward(x_BTD, context) -> y_BTD."""

    def __init__(self, part: MultiHead, *, dim: int, layer: int) -> None:
        super().__init__()
        self.part, self.layer, self.heads = part, layer, part.heads
        width = dim // part.heads
        if part.groups == part.heads:
            self.qkv = Linear(dim, 3 * dim)
        else:
            self.query = Linear(dim, dim)
            self.key, self.value = (Linear(dim, part.groups * width) for _ in range(2))
        self.out = Linear(dim, dim)
        if part.zero_init:
            nn.init.zeros_(self.out.weight)
        self.rotary: Any = part.rotary.build(width) if part.rotary else None
        self.scores: Any = nn.ModuleList(score.build(heads=part.heads) for score in part.scores)
        # Not called a weight, so that optimizers of matrices leave it alone.
        self.gate_HX = nn.Parameter(torch.zeros(part.heads, min(GATE_WIDTH, dim))) if part.gate else None

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_BTHK, k_BTGK, v_BTGK."""
        heads, groups = self.heads, self.part.groups
        width = x_BTD.shape[2] // heads
        if groups == heads:
            q, k, v = self.qkv(x_BTD).unflatten(2, (3, heads, width)).unbind(2)
            return q, k, v
        q_BTHK = self.query(x_BTD).unflatten(2, (heads, width))
        k, v = (layer(x_BTD).unflatten(2, (groups, width)) for layer in (self.key, self.value))
        return q_BTHK, k, v

    def reads_pages(self, q_BTHK: Tensor, cache: Cache) -> bool:
        """Whether the entries are read where they lie, by the kernel for a few new tokens in 16 bits."""
        part = self.part
        # The kernel knows neither scores nor entries that are not what is attended to.
        if not cache.paged or self.scores or part.paired or part.key_offset or part.backend == "plain":
            return False
        few = q_BTHK.shape[1] <= FEW_TOKENS and q_BTHK.dtype in (torch.bfloat16, torch.float16)
        return few and q_BTHK.is_cuda and cannot_run(q_BTHK.device) is None

    def turned(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` gives: queries and keys normalised, at their positions; values with their addend."""
        part = self.part
        if part.rotary_backend == "triton" and context.positions_BT is None:
            heads_BTHK = self.qkv(x_BTD).unflatten(2, (3 * part.heads, -1))
            tables = self.rotary.upto(x_BTD.shape[1])
            addend = added_to(heads_BTHK[:, :, 2 * part.heads :], context)
            return rotary_norm(heads_BTHK, *tables, addend_BTHK=addend)
        q, k, v = self.project(x_BTD)
        if part.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, context.positions_BT), self.rotary(k, context.positions_BT)
        addend = added_to(v, context)
        return q, k, v if addend is None else v + addend

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v = self.turned(x_BTD, context)
        if self.part.scale is not None:
            # Every backend divides by the root of the width.
            q = q * (self.part.scale * q.shape[-1] ** 0.5)
        y_BTHK = self.attended(q, k, v, context)
        if self.part.exclusive_self:
            y_BTHK = exclusive(y_BTHK, v)
        if self.gate_HX is not None:
            y_BTHK = gated(y_BTHK, x_BTD, self.gate_HX)
        return self.out(y_BTHK.flatten(2))

    def attended(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, context: Context) -> Tensor:
        """Each head's output, (B, T, H, K); keys and values are cached where there is a cache."""
        part, q, k, v = self.part, q_BTHK, k_BTGK, v_BTGK
        window = part.window_of(context)
        if context.cache is not None:
            new = {"key": k.flatten(2), "value": v.flatten(2)}
            if self.reads_pages(q, context.cache):
                keys, values = context.cache.append(self.layer, **new).values()
                y_BTHK, _ = decode_heads(
                    q.to(keys.pages_PSX.dtype),
                    keys.pages_PSX,
                    values.pages_PSX,
                    keys.table_BN,
                    keys.lengths_B,
                    scale=q.shape[-1] ** -0.5,
                    window=window,
                )
                return y_BTHK
            cached = context.cache.extend(self.layer, **new)
            k, v = (cached[name].unflatten(2, (part.groups, -1)) for name in new)
        if part.rotary is not None and part.key_offset:
            k = offset_keys(k, context, turning=part.rotary.turning(k.shape[-1]))
        if part.paired:
            return attend_paired(q, k, v, context, backend=part.backend, window=window)
        return attend(q, k, v, context, backend=part.backend, window=window, scores=self.scores)


def added_to(v_BTGK: Tensor, context: Context) -> Tensor | None:
    """What values get beside what their projection gives, as they are."""
    return None if context.values_BTD is None else context.values_BTD.to(v_BTGK.dtype).view_as(v_BTGK)
