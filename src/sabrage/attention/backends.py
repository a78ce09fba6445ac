"""Scaled dot-product attention by several implementations behind one function.

out = softmax(modify(q k^T / sqrt(K)) + mask) v. `plain` is the specification, in fp32, and `sdpa` is torch's
choice. On CUDA `flash` is FlashAttention-2 and `cudnn` is cuDNN's fused attention (FlashAttention-3 class on
Hopper), both through torch's scaled_dot_product_attention, for bf16 and fp16.

The rule: a fused backend is for whole sequences under the masks that it knows, `KNOWS`. Where the mask is
another one, and in decoding from a cache, it gives way to `sdpa` with that mask, or to `plain` where scores
are modified.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sabrage.attention.masks import distances, visible
from sabrage.attention.scores import ScoreModule
from sabrage.context import Context
from sabrage.run.device import DeviceFacts

Backend = Literal["auto", "plain", "sdpa", "flash", "cudnn"]
CUDA_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def fused_refusal(backend: str, facts: DeviceFacts) -> str | None:
    """Why this device, or the format of the run's matrix products, rules a fused backend out; else None."""
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
    return None


def choose_backend(backend: Backend, facts: DeviceFacts) -> Backend:
    """The backend that "auto" means on this device, for products of the run's format ("sdpa" where unknown).

    Measured on an H100 (torch 2.11, head 64, T=2,048, forward / backward TFLOP/s): cuDNN 391 / 320,
    flash 267 / 195. cuDNN's kernels are that fast on Hopper only; Ampere and Ada take flash.
    """
    if backend != "auto":
        return backend
    if facts.products is None or facts.capability is None or fused_refusal("auto", facts):
        return "sdpa"
    return "cudnn" if facts.capability[0] == 9 else "flash"


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
    and documents; keys may then be anything. Raises ValueError where a fused backend meets the wrong tensors.
    """
    if window is not None and window >= k_BSGK.shape[1]:
        window = None
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGX))
    causal = context.cache is None and context.documents_BT is None and window is None and mask_BTS is None
    if backend == "plain" or len(scores):
        out = plain(q, k, v, context, window=window, scores=scores, mask_BTS=mask_BTS)
    elif not causal:
        k, v = (repeated(x, q.shape[1]) for x in (k, v))
        mask = seen(context, k.shape[2], q.device, window, mask_BTS)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    elif backend in CUDA_KERNELS:
        if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"attention backend {backend!r} takes bf16 or fp16 on CUDA and got {q.dtype} on "
                f"{q.device.type}; use backend=auto or sdpa"
            )
        with sdpa_kernel(CUDA_KERNELS[backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        k, v = (repeated(x, q.shape[1]) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def plain(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSX: Tensor,
    context: Context,
    *,
    window: int | None,
    scores: Sequence[ScoreModule],
    mask_BTS: Tensor | None,
) -> Tensor:
    """The specification: every product and the softmax in fp32, also under autocast."""
    heads, num_keys, device = q_BHTK.shape[1], k_BGSK.shape[2], q_BHTK.device
    with torch.autocast(device.type, enabled=False):
        k, v = (repeated(x.float(), heads) for x in (k_BGSK, v_BGSX))
        score_BHTS = (q_BHTK.float() @ k.transpose(-1, -2)) * q_BHTK.shape[-1] ** -0.5
        if scores:
            head_H11 = torch.arange(heads, device=device)[:, None, None]
            distance_B1TS = distances(context, num_keys, device)[:, None]
            for score in scores:
                score_BHTS = score.function(num_keys)(score_BHTS, head_H11, distance_B1TS)
        mask = seen(context, num_keys, device, window, mask_BTS)
        weights = score_BHTS.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ v).to(v_BGSX.dtype)


def seen(
    context: Context, num_keys: int, device: torch.device, window: int | None, mask_BTS: Tensor | None
) -> Tensor:
    """The mask of every query and key, (B or 1, 1, T, S)."""
    if mask_BTS is not None:
        return mask_BTS[:, None]
    return visible(context, num_keys, device, window=window)


def repeated(x_BGSX: Tensor, heads: int) -> Tensor:
    """Each key/value head once for every query head that reads it, (B, H, S, X)."""
    groups = x_BGSX.shape[1]
    return x_BGSX if groups == heads else x_BGSX.repeat_interleave(heads // groups, dim=1)
