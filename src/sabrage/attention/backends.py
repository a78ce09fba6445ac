"""Scaled dot-product attention by several implementations behind one function.

out = softmax(q k^T / sqrt(K) + mask) v. `plain` is the specification and `sdpa` is torch's choice. On CUDA
`flash` is FlashAttention-2 and `cudnn` is cuDNN's fused attention (FlashAttention-3 class on Hopper), both
through torch's scaled_dot_product_attention, for bf16 and fp16.

The rule: a fused backend is for whole sequences under the plain causal mask. Where the mask is another one,
in decoding from a cache and with documents, every backend but `plain` is `sdpa` with that mask.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def visible(context: Context, num_keys: int, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S) mask, true where query t may see key s: not later, and of the same document.

    From a cache key s is position s; without one queries and keys are the same tokens, in order.
    """
    queries_BT = keys_BS = torch.arange(num_keys, device=device)[None]
    if context.cache is not None:
        assert context.positions_BT is not None, "decoding needs the positions of its queries"
        assert context.documents_BT is None, "a cache knows no documents"
        queries_BT = context.positions_BT
    mask_BTS = keys_BS[:, None, :] <= queries_BT[:, :, None]
    if context.documents_BT is not None:
        mask_BTS = mask_BTS & (context.documents_BT[:, :, None] == context.documents_BT[:, None, :])
    return mask_BTS[:, None]


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, context: Context, *, backend: Backend) -> Tensor:
    """Causal attention, (B, T, H, K). Raises ValueError where a fused backend meets the wrong tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    plain_causal = context.cache is None and context.documents_BT is None
    if backend == "plain":
        mask = visible(context, k.shape[2], q.device)
        scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        out = (weights @ v.float()).to(v.dtype)
    elif not plain_causal:
        mask = visible(context, k.shape[2], q.device)
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
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)
