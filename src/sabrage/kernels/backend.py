"""Whether a part runs its Triton kernel or the plain-torch reference: resolved once, then recorded."""

from typing import Literal

from sabrage.run.device import DeviceFacts

KernelBackend = Literal["auto", "triton", "plain"]


def runs_triton(facts: DeviceFacts) -> bool:
    """Whether the kernels of this room run on this device."""
    return facts.capability is not None and facts.capability >= (8, 0) and facts.triton is not None


def kernel_refusal(backend: KernelBackend, facts: DeviceFacts) -> str | None:
    """Why this device rules the named backend out, or None."""
    if backend != "triton" or runs_triton(facts):
        return None
    return (
        f"backend 'triton' needs an NVIDIA card of compute capability 8.0 or newer and Triton; this is "
        f"{facts.name}; use backend 'auto' or 'plain'"
    )


def choose_kernel(backend: KernelBackend, facts: DeviceFacts) -> KernelBackend:
    """What "auto" means on this device; a named backend stays as it is."""
    if backend != "auto":
        return backend
    return "triton" if runs_triton(facts) else "plain"
