"""Scaled dot-product attention by several implementations behind one function.

out = softmax(modify(q k^T / sqrt(K)) + mask) v. `plain` is the specification, in fp32, and `sdpa` is torch's
choice; both run everywhere. The others are for CUDA, bf16 and fp16: `flash` is FlashAttention-2 and `cudnn`
cuDNN's fused attention (FlashAttention-3 class on Hopper), `flex` is FlexAttention, `varlen` FlashAttention-2
over a flat batch, `triton` a kernel of ours, `fa3` and `fa4` are packages of their own.

The rule: a fused backend is for whole sequences under the masks that it knows, `KNOWS`. Where the mask is
another one, and in decoding from a cache, it gives way to `sdpa` with that mask, or to `plain` where scores
are modified.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sabrage.attention import packages
from sabrage.attention.dense import masked, of_one_width, plain, repeated
from sabrage.attention.scores import ScoreModule
from sabrage.attention.varlen import varlen
from sabrage.context import Context
from sabrage.kernels import span_attention
from sabrage.kernels.language import require
from sabrage.run.device import DeviceFacts

Backend = Literal["auto", "plain", "sdpa", "flash", "cudnn", "flex", "triton", "varlen", "fa3", "fa4"]
# What a mask may need beside causality.
Need = Literal["window", "documents", "scores"]

# What each backend can do beside causal attention.
KNOWS: dict[str, set[Need]] = {
    "plain": {"window", "documents", "scores"},
    "sdpa": {"window", "documents"},
    "flash": set(),
    "cudnn": set(),
    "flex": {"window", "documents", "scores"},
    "triton": {"window", "documents"},
    "varlen": {"window", "documents"},
    "fa3": {"window"},
    "fa4": {"window"},
}
CUDA_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# The widest head of those that have a limit.
WIDEST = {"flash": 256, "cudnn": 128, "triton": span_attention.WIDEST, "varlen": 256, "fa3": 256, "fa4": 128}

# What "auto" tries, in order, by the first number of the compute capability: the first that knows the mask
# and can be used. Measured on an H100 (results/attention.json; torch 2.11, T=2,048, forward / backward
# TFLOP/s at head widths 128 and 64). Causal: cudnn 547 / 402 and 410 / 321, flex 333 / 290 and 319 / 227,
# flash 300 / 244 and 267 / 218. A window of 512: flex 230 / 185 and 198 / 144, varlen 183 / 179 and 96 / 156,
# sdpa 77 / 61 and 60 / 58. Documents: flex 146 / 117 and 75 / 91, varlen 83 / 73 and 60 / 52, sdpa 36 / 36
# and 30 / 34. On an H200, heads of 128, documents of the corpus in windows of 512 and 2,048, backward: triton
# 0.65 and 0.82 ms, flex 0.95 and 1.06 (results/fast-kernels-2.json); it is taken for documents alone.
# Not measured here: triton without documents, fa3 with a window (modded-nanogpt went from FlexAttention to
# it, and gained), fa4 (for Blackwell its authors report more than cuDNN), and every card but Hopper, where
# flash is the safe choice.
PREFERRED: dict[int, tuple[Backend, ...]] = {
    8: ("flash", "flex"),
    9: ("cudnn", "triton", "fa3", "flex", "flash"),
    10: ("fa4", "cudnn", "flex", "flash"),
}
OTHERWISE: tuple[Backend, ...] = ("flash", "flex")


def needs_of(*, window: bool = False, documents: bool = False, scores: bool = False) -> frozenset[Need]:
    """What a mask needs, as a set."""
    asked: dict[Need, bool] = {"window": window, "documents": documents, "scores": scores}
    return frozenset(need for need, wanted in asked.items() if wanted)


def ignorance(backend: str, needs: Collection[Need]) -> str | None:
    """Why the backend cannot do what is needed on any device, with what can; else None."""
    if backend == "auto" or KNOWS[backend].issuperset(needs):
        return None
    told = ", ".join(sorted(set(needs) - KNOWS[backend]))
    others = ", ".join(name for name, known in KNOWS.items() if known.issuperset(needs))
    return f"attention backend {backend!r} knows no {told}; use backend=auto, or one of {others}"


def fused_refusal(backend: str, facts: DeviceFacts, *, width: int | None = None) -> str | None:
    """Why this device, or the format of the run's matrix products, rules a fused backend out; else None.

    The packages of `fa3` and `fa4` are run to find out.
    """
    if facts.kind != "cuda" or facts.capability is None or facts.capability < (8, 0):
        return (
            f"attention backend {backend!r} needs a CUDA device of compute capability 8.0 and {facts.name} "
            "is none; use backend=auto or sdpa"
        )
    if facts.products in ("fp32", "tf32"):
        return (
            f"attention backend {backend!r} takes bf16 or fp16 and the products of this run are "
            f"{facts.products}; use backend=auto or sdpa, or --set precision=Bf16"
        )
    if width is not None and width > WIDEST.get(backend, width):
        return (
            f"attention backend {backend!r} takes heads of width {WIDEST[backend]} at most and these have "
            f"{width}; use backend=auto or flex, or more heads"
        )
    if backend == "triton" and facts.triton is None:
        return "attention backend 'triton' needs Triton, which is missing; pip install triton, or use flex"
    if backend in packages.MODULES:
        reason = packages.missing(backend)
        return reason and f"attention backend {backend!r} {reason}; use backend=auto, cudnn or flex"
    return None


def refusal(
    backend: Backend, facts: DeviceFacts, needs: Collection[Need] = (), *, width: int | None = None
) -> str | None:
    """Why this backend cannot be had on this device under this mask, or None when it can."""
    if backend in ("auto", "plain", "sdpa"):
        return ignorance(backend, needs)
    return ignorance(backend, needs) or fused_refusal(backend, facts, width=width)


def choose_backend(
    backend: Backend, facts: DeviceFacts, needs: Collection[Need] = (), *, width: int | None = None
) -> Backend:
    """The backend that "auto" means on this device and under this mask, for products of the run's format.

    `plain` and `sdpa` where no fused one can be used, and where the format is unknown.
    """
    if backend != "auto":
        return backend
    if facts.products is not None and facts.capability is not None:
        for name in PREFERRED.get(facts.capability[0], OTHERWISE):
            measured = name != "triton" or "documents" in needs
            if measured and refusal(name, facts, needs, width=width) is None:
                return name
    return "plain" if "scores" in needs else "sdpa"


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGX: Tensor,
    context: Context,
    *,
    backend: Backend,
    window: int | None = None,
    scores: Sequence[ScoreModule] = (),
    mask_BTS: Tensor | None = None,
) -> Tensor:
    """Causal attention, (B, T, H, X); G divides H and head h reads key/value head h // (H / G).

    `window` is how many tokens a query sees, itself included. `scores` change the scores, in this order.
    `mask_BTS`, (B or 1, T, S), true where query t sees key s, takes the place of the causal mask, of window
    and documents; keys may then be anything, and only plain and flex modify scores. Every query must see
    something. "auto" that nobody has resolved is `sdpa`. Raises ValueError where a fused backend meets the
    wrong tensors.
    """
    if backend == "auto":
        backend = "sdpa"
    if window is not None and window >= k_BSGK.shape[1]:
        window = None
    if backend in CUDA_KERNELS and k_BSGK.shape[1] == 1:
        # cuDNN takes no sequence of one token.
        backend = "sdpa"
    needs = needs_of(
        window=window is not None, documents=context.documents_BT is not None, scores=len(scores) > 0
    )
    decoding, given = context.cache is not None, mask_BTS is not None
    known = KNOWS[backend].issuperset(needs) and not decoding and (not given or backend == "flex")
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGX))
    if backend == "plain" or (scores and not known):
        out = plain(q, k, v, context, window=window, scores=scores, mask_BTS=mask_BTS)
    elif not known or (backend == "sdpa" and needs):
        out = masked(q, k, v, context, window=window, mask_BTS=mask_BTS)
    elif backend == "flex":
        # Only where it is used: it takes the whole compiler along, seconds of every start.
        from sabrage.attention.flex import flex

        out = flex(q, k, v, context, window=window, scores=scores, mask_BTS=mask_BTS)
    elif backend == "sdpa":
        k, v = (repeated(x, q.shape[1]) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        if backend == "triton":
            require(q_BTHK.device)
        else:
            check_fused(backend, q_BTHK)
        return fused(backend, q_BTHK, k_BSGK, v_BSGX, context, window)
    return out.transpose(1, 2)


def check_fused(backend: str, q_BTHK: Tensor) -> None:
    """Raises ValueError for tensors that fused kernels do not take."""
    if not q_BTHK.is_cuda or q_BTHK.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention backend {backend!r} takes bf16 or fp16 on CUDA and got {q_BTHK.dtype} on "
            f"{q_BTHK.device.type}; use backend=auto or sdpa"
        )


def fused(
    backend: Backend,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGX: Tensor,
    context: Context,
    window: int | None,
) -> Tensor:
    """Whole sequences by one of the kernels for CUDA alone, (B, T, H, X)."""
    if backend in packages.MODULES:
        return packages.run(backend, q_BTHK, k_BTGK, v_BTGX, window=window)
    heads, width, scale = q_BTHK.shape[2], v_BTGX.shape[3], q_BTHK.shape[3] ** -0.5
    q, k, v = (repeated(x.transpose(1, 2), heads) for x in (q_BTHK, k_BTGK, v_BTGX))
    if backend == "varlen":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return varlen(q, k, v, context, window=window)
    q, k, v = of_one_width(q, k, v)
    if backend == "triton":
        like_BT, documents_BT = q[:, 0, :, 0], context.documents_BT
        spans = context.once(
            ("spans", like_BT.shape, window), lambda: span_attention.spans(like_BT, documents_BT, window)
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return span_attention.span_attention(q, k, v, *spans, scale=scale)[..., :width]
    with sdpa_kernel(CUDA_KERNELS[backend]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out[..., :width].transpose(1, 2)
