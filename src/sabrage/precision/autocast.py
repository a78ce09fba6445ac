"""fp32, TF32, and bf16 for products (Kalamkar et al. 2019, arXiv 1905.12322) or for the weights as well.

fp32 has 24 significant bits, TF32 11 and bf16 8, all three with fp32's range, so that nothing needs scaling.
Norms, softmax, cross-entropy and optimizer state are fp32 throughout.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sabrage.parts import Precision
from sabrage.run.device import DeviceFacts


def set_switches(*, tf32: bool = False) -> None:
    """Sets every switch of the process that changes how a product is computed: runs inherit none."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def lacking(what: str, least: tuple[int, int], facts: DeviceFacts) -> str | None:
    """The sentence with which a format refuses a device of less than `least`, or None."""
    capability = facts.capability or (0, 0)
    if capability >= least:
        return None
    instead = "Bf16" if capability >= (8, 0) else "Fp16" if capability >= (7, 0) else "Fp32"
    needs, has = (".".join(map(str, pair)) for pair in (least, capability))
    return (
        f"{what} needs a GPU of compute capability {needs} and {facts.name} has "
        f"{has if facts.capability else 'none'}; use --set precision={instead}"
    )


@dataclass(frozen=True, kw_only=True)
class Fp32(Precision):
    """Everything in fp32, products too."""

    def refusal(self, facts: DeviceFacts) -> str | None:
        return None

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        set_switches()
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def peak(self) -> str:
        return "fp32"


@dataclass(frozen=True, kw_only=True)
class Tf32(Precision):
    """fp32 everywhere, but products round their inputs to TF32 and sum in fp32."""

    def refusal(self, facts: DeviceFacts) -> str | None:
        return lacking("TF32", (8, 0), facts)

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        set_switches(tf32=True)
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def peak(self) -> str:
        return "tf32"


@dataclass(frozen=True, kw_only=True)
class Bf16(Precision):
    """fp32 weights and optimizer state, matrix products in bf16 by torch's autocast."""

    def refusal(self, facts: DeviceFacts) -> str | None:
        return None if facts.has_bf16 else lacking("bf16", (8, 0), facts)

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        set_switches()
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def peak(self) -> str:
        return "bf16"


@dataclass(frozen=True, kw_only=True)
class Bf16Weights(Precision):
    """bf16 matrices, gradients and residual stream; optimizers move fp32 masters, vectors stay fp32.

    Saves the traffic of casting weights and of an fp32 residual stream and gradients. It saves no memory on
    weights (2 bytes and a master of 4), and gradients add up in bf16: n micro-batches cost a relative error
    of about sqrt(n) / 800.
    """

    def refusal(self, facts: DeviceFacts) -> str | None:
        return None if facts.has_bf16 else lacking("bf16", (8, 0), facts)

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        set_switches()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def masters(self) -> bool:
        return True

    def peak(self) -> str:
        return "bf16"
