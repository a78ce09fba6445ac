"""FlashAttention-3 and -4 from packages of their own, the extras `fa3` and `fa4`.

FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) is for Hopper; `kernels` fetches a build of it from the
Hugging Face hub. FlashAttention-4 (`flash-attn-4`) is for Blackwell and Hopper; its functions know nothing of
torch.compile and become operations of ours. A package that loads may still fail on this card: whether one can
be used is found out by running it, forward and backward, once a process and only when it is asked for.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sabrage.attention.dense import of_one_width, plain
from sabrage.context import Context

MODULES = {"fa3": "kernels", "fa4": "flash_attn.cute"}
FA3_BUILD = ("kernels-community/flash-attn3", 1)
# What has been loaded, by the backend's name; compiled code finds it here.
FUNCTIONS: dict[str, Any] = {}


def run(name: str, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGX: Tensor, *, window: int | None) -> Tensor:
    """Causal attention of whole sequences, (B, T, H, X), by the package of this name."""
    scale, width = q_BTHK.shape[-1] ** -0.5, v_BTGX.shape[-1]
    q, k, v = of_one_width(q_BTHK, k_BTGK, v_BTGX)
    left = None if window is None else window - 1
    if name == "fa4":
        return fa4(q, k, v, scale, left)[0][..., :width]
    reach = (-1 if left is None else left, 0)
    out = fa3()(q, k, v, softmax_scale=scale, causal=True, window_size=reach)
    return (out[0] if isinstance(out, tuple) else out)[..., :width]


def fa3() -> Any:
    """The package's function, from the hub where it is not there yet."""
    if "fa3" not in FUNCTIONS:
        from kernels import get_kernel

        repository, version = FA3_BUILD
        FUNCTIONS["fa3"] = get_kernel(repository, version=version).flash_attn_func
    return FUNCTIONS["fa3"]


@torch.library.custom_op("sabrage::flash_attention_4", mutates_args=())
def fa4(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None) -> tuple[Tensor, Tensor]:
    """(out, log of the sum of exponentials (B, H, T) fp32); `left` is how many tokens back a query sees."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=left is None, return_lse=True, **sides(left)
    )
    return out, lse


@torch.library.custom_op("sabrage::flash_attention_4_backward", mutates_args=())
def fa4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, softmax_scale=scale, causal=left is None, **sides(left)
    )
    return dq, dk, dv


def sides(left: int | None) -> dict[str, int]:
    """The window in the words of FlashAttention-4."""
    return {} if left is None else {"window_size_left": left, "window_size_right": 0}


@fa4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@fa4_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, ctx.left = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:
    q, k, v, out, lse = ctx.saved_tensors
    return *fa4_backward(grad, q, k, v, out, lse, ctx.scale, ctx.left), None, None


fa4.register_autograd(_backward, setup_context=_keep)


@cache
def missing(name: str) -> str | None:
    """Why the package of this name cannot be used on the current CUDA device, or None when it can."""
    root, *_ = MODULES[name].split(".")
    if importlib.util.find_spec(root) is None:
        return f"is not installed (pip install 'sabrage[{name}]')"
    if not torch.cuda.is_available():
        return "needs a CUDA device and torch sees none"
    try:
        error = trial(name)
    # Whatever a foreign package raises is the reason, and is told.
    except Exception as error_raised:
        return f"fails on this device: {type(error_raised).__name__}: {error_raised}"
    return None if error < 0.05 else f"is wrong on this device by {error:.2g}"


def trial(name: str) -> float:
    """The largest error of the output and of all gradients, in bf16, against the reference in fp32."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(1, 128, 2, 64, generator=generator, device="cuda") for _ in range(3)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        if dtype == torch.bfloat16:
            out = run(name, q, k, v, window=32)
        else:
            first, second, third = (x.transpose(1, 2) for x in (q, k, v))
            out = plain(first, second, third, Context(), window=32, scores=(), mask_BTS=None).transpose(1, 2)
        results.append([out, *torch.autograd.grad(out.sum(), [q, k, v])])
    pairs = zip(*results, strict=True)
    return max((narrow.float() - exact).abs().max().item() for narrow, exact in pairs)
