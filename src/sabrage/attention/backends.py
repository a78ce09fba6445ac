"""Scaled dot-product attention by several implementations behind one function.

out = softmax(q k^T / sqrt(K) + mask) v. `plain` is the specification. On CUDA `flash` is
FlashAttention-2 and `cudnn` is cuDNN's fused attention (FlashAttention-3 class on Hopper), both through
torch's scaled_dot_product_attention; they take a plain causal mask only.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sabrage.parts import Context
from sabrage.run.device import DeviceFacts

Backend = Literal["auto", "plain", "sdpa", "flash", "cudnn"]
CUDA_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def choose_backend(backend: Backend, facts: DeviceFacts) -> Backend:
    """The backend that "auto" means on this device.

    Measured on an H100 (torch 2.11, head 64, T=2,048, forward / backward TFLOP/s): cuDNN 391 / 320,
    flash 267 / 195. cuDNN's kernels are that fast on Hopper only; Ampere and Ada take flash.
    """
    if backend != "auto":
        return backend
    if facts.kind != "cuda" or facts.capability is None or facts.capability < (8, 0):
        return "sdpa"
    return "cudnn" if facts.capability[0] == 9 else "flash"


def visible(context: Context, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S) mask, true where query t may see key s: not later, and of the same document."""
    keys_S = torch.arange(num_keys, device=device)
    if context.positions_BT is None:
        queries_BT = torch.arange(num_queries, device=device)[None]
    else:
        queries_BT = context.positions_BT
    mask_BTS = keys_S[None, None, :] <= queries_BT[:, :, None]
    if context.documents_BT is not None:
        mask_BTS = mask_BTS & (context.documents_BT[:, :, None] == context.documents_BT[:, None, :])
    return mask_BTS[:, None]


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, context: Context, *, backend: Backend) -> Tensor:
    """Causal attention, (B, T, H, K). Raises ValueError when a fused backend meets a mask it cannot do."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    plain_causal = context.positions_BT is None and context.documents_BT is None
    if backend == "plain":
        mask = visible(context, q.shape[2], k.shape[2], q.device)
        scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        out = (weights @ v.float()).to(v.dtype)
    elif not plain_causal:
        mask = visible(context, q.shape[2], k.shape[2], q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    elif backend in CUDA_KERNELS and q.dtype in (torch.bfloat16, torch.float16):
        with sdpa_kernel(CUDA_KERNELS[backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)
