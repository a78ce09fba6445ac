"""Without a CUDA device Triton interprets its kernels; it must be told before any kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
