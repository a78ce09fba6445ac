"""fp32, and bf16 by autocast: fp32 weights, matrix products in bf16 (Kalamkar et al. 2019, 1905.12322)."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sabrage.parts import Precision
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Fp32(Precision):
    """Everything in fp32, products too."""

    def refusal(self, facts: DeviceFacts) -> str | None:
        return None

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        torch.set_float32_matmul_precision("highest")
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def peak(self) -> str:
        return "fp32"


@dataclass(frozen=True, kw_only=True)
class Bf16(Precision):
    """fp32 weights and optimizer state, matrix products in bf16 by torch's autocast."""

    def refusal(self, facts: DeviceFacts) -> str | None:
        if facts.has_bf16:
            return None
        version = ".".join(map(str, facts.capability or ()))
        return f"bf16 needs compute capability 8.0 and {facts.name} has {version}; use --set precision=Fp32"

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        torch.set_float32_matmul_precision("highest")
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def peak(self) -> str:
        return "bf16"
