"""Triton where it is installed, and a plain refusal where it is not.

Operation files take `jit` and `tl` from here, so that they and their references import on any machine.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=None)


class KernelError(ValueError):
    """A kernel that cannot run here: says what was got, what is allowed and the remedy."""


def jit(function: Callable[..., None], *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or the function itself where Triton is missing; `require` refuses before it is used.

    Arguments in `do_not_specialize` are not compiled anew for 1 and for multiples of 16.
    """
    return triton.jit(function, do_not_specialize=do_not_specialize) if triton else function


def refusal(device: torch.device) -> str | None:
    """A sentence saying why Triton kernels cannot run on this device, or None when they can."""
    if triton is None:
        return (
            "a Triton kernel was asked for and Triton is missing; pip install triton, or use the plain path"
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return None
        version = ".".join(map(str, capability))
        return f"the kernels need compute capability 8.0 and got {version}; use the plain path"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return (
        f"a Triton kernel was asked for on device '{device.type}'; it needs 'cuda' (on 'cpu' only the "
        "interpreter runs it: set TRITON_INTERPRET=1 before starting Python); use the plain path"
    )


def require(device: torch.device) -> None:
    """Raises KernelError when Triton kernels cannot run on this device."""
    sentence = refusal(device)
    if sentence:
        raise KernelError(sentence)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter counts as 8.6."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; the interpreter counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
