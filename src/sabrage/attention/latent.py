"""Multi-head latent attention: keys and values out of one narrow latent, which alone is cached.

DeepSeek-V2 (arXiv 2405.04434, section 2.1) and V3 (arXiv 2412.19437). With c_s = norm(W_latent x_s) and one
rotary key r_s = rotate(W_rotary x_s) for all heads, head h has

    key    k_hs = [W_key_h c_s ; r_s]             query  q_ht = [u_ht ; rotate(p_ht)],  [u ; p] = W_query x_t
    value  v_hs = W_value_h c_s                   out    y_ht = sum_s softmax_s(q_ht . k_hs / sqrt(K)) v_hs

Training attends in this expanded form. A cache holds [c_s ; r_s] and nothing else. Few new tokens attend in
the absorbed form, where u . (W_key c) = (W_key^T u) . c and sum_s a_s W_value c_s = W_value (sum_s a_s c_s):
all heads share one key of R + rotary numbers, whose first R are the value. Many new tokens expand the cache
anew, which costs fewer products for more than R (C + V) / (2 R - C - V) of them, C and V being the widths of
a head's content key and of its value. A cache in pages is read by `sabrage.kernels.paged_latent`.

The norm has no gain of its own: one would be part of W_key and W_value. Shapes beside those of the legend:
C content key width, X = R + rotary the width of the stream.

Choosing ranks at width 768, per layer:

| setting | parameters | floats cached per token |
| --- | ---: | ---: |
| `MultiHead(heads=12)` | 2,359,296 | 1,536 |
| `mla` | 1,695,744 | 288 |
| `mla-small` | 1,572,864 | 224 |
| as many parameters as `MultiHead`: kv_rank=601 | 2,358,144 | 633 |
| caches as two key/value heads do: kv_rank=224 | 1,634,304 | 256 |
| DeepSeek's kv_rank=512, rotary_width=64, head_width=64 | 2,998,272 | 576 |
"""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.attention.backends import Backend, Need, attend, choose_backend, needs_of, refusal
from sabrage.attention.masks import visible
from sabrage.attention.rotary import Rotary
from sabrage.context import Context, Pages
from sabrage.kernels.backend import KernelBackend, choose_kernel, kernel_refusal
from sabrage.kernels.paged_latent import decode
from sabrage.linear import Linear
from sabrage.norms import rms_norm
from sabrage.parts import Mixer
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class MultiHeadLatent(Mixer):
    """Attention over a latent of `kv_rank` numbers and a rotary key of `rotary_width` per token.

    A head's key is `head_width` + `rotary_width` wide and its value `value_width`; where the two are equal
    every attention kernel applies. `query_rank` makes queries from a normalised latent as well (None: from
    the input). `qk_norm` normalises each query and the rotary key; the rest of a key comes from a normalised
    latent, and a norm of its own would leave no absorbed form. `zero_init` starts the output projection at
    zero. A layer sees the last `window` tokens, itself included, or all before it. `decode` is how few new
    tokens meet a cache in pages: read where they lie by the kernel, or gathered.
    """

    heads: int
    kv_rank: int = 256
    rotary_width: int = 32
    head_width: int = 32
    value_width: int = 64
    query_rank: int | None = None
    rotary: Rotary = field(default_factory=Rotary)
    qk_norm: bool = False
    zero_init: bool = False
    window: int | None = None
    backend: Backend = "auto"
    decode: KernelBackend = "auto"

    def problems(self) -> list[str]:
        names = ("heads", "kv_rank", "head_width", "value_width", "query_rank", "window")
        sizes = {name: getattr(self, name) for name in names}
        found = [
            f"mixer.{name}={size} must be at least 1"
            for name, size in sizes.items()
            if size is not None and size < 1
        ]
        if self.rotary_width < 2 or self.rotary_width % 2:
            found.append(f"mixer.rotary_width={self.rotary_width} must be even and at least 2; use 32 or 64")
        return found

    def build(self, *, dim: int, layer: int) -> nn.Module:
        return LatentAttention(self, dim=dim, layer=layer)

    def needs(self, facts: DeviceFacts) -> frozenset[Need]:
        return needs_of(window=self.window is not None, documents=facts.documents)

    @property
    def widest(self) -> int:
        return max(self.head_width + self.rotary_width, self.value_width)

    def refusal(self, facts: DeviceFacts) -> str | None:
        attention = refusal(self.backend, facts, self.needs(facts), width=self.widest)
        return attention or kernel_refusal(self.decode, facts)

    def resolve(self, facts: DeviceFacts) -> Self:
        chosen = choose_backend(self.backend, facts, self.needs(facts), width=self.widest)
        return replace(self, backend=chosen, decode=choose_kernel(self.decode, facts))

    def streams(self, dim: int) -> dict[str, int]:
        return {"latent": self.kv_rank + self.rotary_width}

    def flops(self, dim: int, sequence_length: int) -> int:
        key_width = self.head_width + self.rotary_width
        queries = self.heads * key_width
        weights = dim * (self.kv_rank + self.rotary_width) + self.heads * self.value_width * dim
        weights += dim * queries if self.query_rank is None else self.query_rank * (dim + queries)
        weights += self.kv_rank * self.heads * (self.head_width + self.value_width)
        window = min(self.window or sequence_length, sequence_length)
        # The first `window` tokens see 1, 2, ... and the others `window` each.
        pairs = window * (window + 1) // 2 + (sequence_length - window) * window
        return 2 * weights + 2 * self.heads * (key_width + self.value_width) * pairs // sequence_length


class LatentAttention(nn.Module):
    """The module of `MultiHeadLatent`: forward(x_BTD, context) -> y_BTD.

    `absorbed_tokens` is the largest number of new tokens that attend to a cache in the absorbed form.
    """

    def __init__(self, part: MultiHeadLatent, *, dim: int, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.qk_norm = layer, part.heads, part.qk_norm
        self.window, self.backend, self.kernel = part.window, part.backend, part.decode == "triton"
        self.kv_rank, self.rotary_width, self.head_width = part.kv_rank, part.rotary_width, part.head_width
        queries = part.heads * (part.head_width + part.rotary_width)
        self.query_down = None if part.query_rank is None else Linear(dim, part.query_rank)
        self.query = Linear(dim if part.query_rank is None else part.query_rank, queries)
        self.latent = Linear(dim, part.kv_rank)
        self.rotary_key = Linear(dim, part.rotary_width)
        self.key = Linear(part.kv_rank, part.heads * part.head_width)
        self.value = Linear(part.kv_rank, part.heads * part.value_width)
        self.out = Linear(part.heads * part.value_width, dim)
        if part.zero_init:
            nn.init.zeros_(self.out.weight)
        self.rotary = part.rotary.build(part.rotary_width)
        both = part.head_width + part.value_width
        gain = 2 * part.kv_rank - both
        self.absorbed_tokens: float = part.kv_rank * both / gain if gain > 0 else float("inf")

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q_BTHK = self.queries(x_BTD, context)
        stream_BTX = self.compress(x_BTD, context)
        if context.cache is None:
            return self.out(self.expanded(q_BTHK, stream_BTX, context).flatten(2))
        few = x_BTD.shape[1] <= self.absorbed_tokens
        if few and self.kernel and context.cache.paged:
            stream = context.cache.append(self.layer, latent=stream_BTX)["latent"]
            return self.out(self.paged(q_BTHK, stream).flatten(2))
        stream_BSX = context.cache.extend(self.layer, latent=stream_BTX)["latent"]
        y_BTHV = (self.absorbed if few else self.expanded)(q_BTHK, stream_BSX, context)
        return self.out(y_BTHV.flatten(2))

    def queries(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Queries, (B, T, H, C + rotary), the last `rotary_width` numbers turned."""
        if self.query_down is not None:
            x_BTD = rms_norm(self.query_down(x_BTD))
        q_BTHK = self.query(x_BTD).unflatten(-1, (self.heads, -1))
        if self.qk_norm:
            q_BTHK = rms_norm(q_BTHK)
        content_BTHC, rest = q_BTHK.split([self.head_width, self.rotary_width], dim=-1)
        return torch.cat((content_BTHC, self.rotary(rest, context.positions_BT)), dim=-1)

    def compress(self, x_BTD: Tensor, context: Context) -> Tensor:
        """What is cached, (B, T, X): the normalised latent and the turned key of all heads."""
        key_BTHK = self.rotary_key(x_BTD).unsqueeze(2)
        if self.qk_norm:
            key_BTHK = rms_norm(key_BTHK)
        key_BTHK = self.rotary(key_BTHK, context.positions_BT)
        return torch.cat((rms_norm(self.latent(x_BTD)), key_BTHK.squeeze(2)), dim=-1)

    def expanded(self, q_BTHK: Tensor, stream_BSX: Tensor, context: Context) -> Tensor:
        """Attention with every head's own keys and values, (B, T, H, V)."""
        latent_BSR, shared_BSK = stream_BSX.split([self.kv_rank, self.rotary_width], dim=-1)
        content_BSHC = self.key(latent_BSR).unflatten(-1, (self.heads, -1))
        shared_BSHK = shared_BSK.unsqueeze(2).expand(-1, -1, self.heads, -1)
        k_BSHK = torch.cat((content_BSHC, shared_BSHK), dim=-1)
        v_BSHV = self.value(latent_BSR).unflatten(-1, (self.heads, -1))
        return attend(q_BTHK, k_BSHK, v_BSHV, context, backend=self.backend, window=self.window)

    def absorbed(self, q_BTHK: Tensor, stream_BSX: Tensor, context: Context) -> Tensor:
        """The same over the stream as it is: the heads of a token are so many queries of one head."""
        q_B1MX = self.absorb(q_BTHK).flatten(1, 2).unsqueeze(1)
        mask = visible(context, stream_BSX.shape[1], q_BTHK.device, window=self.window)
        mask = mask.repeat_interleave(self.heads, dim=2)
        key_B1SX, scale = stream_BSX.unsqueeze(1), q_BTHK.shape[-1] ** -0.5
        value_B1SR = key_B1SX[..., : self.kv_rank]
        out_B1MR = F.scaled_dot_product_attention(q_B1MX, key_B1SX, value_B1SR, attn_mask=mask, scale=scale)
        return self.lift(out_B1MR.squeeze(1).unflatten(1, (-1, self.heads)))

    def paged(self, q_BTHK: Tensor, stream: Pages) -> Tensor:
        """The absorbed form for the last tokens of every sequence, by a kernel that reads the pages."""
        out_BTHR, _ = decode(
            self.absorb(q_BTHK),
            stream.pages_PSX,
            stream.table_BN,
            stream.lengths_B,
            value_width=self.kv_rank,
            scale=q_BTHK.shape[-1] ** -0.5,
            window=self.window,
        )
        return self.lift(out_BTHR)

    def absorb(self, q_BTHK: Tensor) -> Tensor:
        """Queries that meet the stream, (B, T, H, X)."""
        content_BTHC, turned_BTHK = q_BTHK.split([self.head_width, self.rotary_width], dim=-1)
        key_HCR = self.key.weight.unflatten(0, (self.heads, -1)).to(q_BTHK.dtype)
        return torch.cat((torch.einsum("bthc,hcr->bthr", content_BTHC, key_HCR), turned_BTHK), dim=-1)

    def lift(self, latent_BTHR: Tensor) -> Tensor:
        """Averages of latents to averages of values, (B, T, H, V)."""
        value_HVR = self.value.weight.unflatten(0, (self.heads, -1)).to(latent_BTHR.dtype)
        return torch.einsum("bthr,hvr->bthv", latent_BTHR, value_HVR)
