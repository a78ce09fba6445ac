"""Whether a part runs its Triton kernel or the plain-torch reference: resolved once, then recorded."""

from typing import Literal

from sabrage.config import ConfigError
from sabrage.run.device import DeviceFacts

KernelBackend = Literal["auto", "triton", "plain"]


def choose_kernel(backend: KernelBackend, facts: DeviceFacts) -> KernelBackend:
    """What "auto" means on this device. Raises ConfigError for "triton" where it cannot run."""
    able = facts.capability is not None and facts.capability >= (8, 0) and facts.triton is not None
    if backend == "triton" and not able:
        raise ConfigError(
            f"backend 'triton' needs an NVIDIA card of compute capability 8.0 or newer and Triton; this is "
            f"{facts.name}; use backend 'auto' or 'plain'"
        )
    if backend == "auto":
        return "triton" if able else "plain"
    return backend
