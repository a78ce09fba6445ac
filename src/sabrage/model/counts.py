"""What a model costs: parameters, FLOPs per token, and an estimate of memory."""

from functools import cache

import torch

from sabrage.model.lm import LM, ModelSpec

# Bytes of saved activations per token, layer and unit of width, bf16 autocast over an fp32 residual
# stream, compiled: fitted to the 16.7, 31.1 and 60.0 GiB that the NoCap baseline takes at 32, 64 and 128
# rows of 1,024 (one H200, torch 2.11).
ACTIVATION_BYTES = 30
# Weights, gradients and two AdamW moments in fp32, and a bf16 copy of the weights.
PARAMETER_BYTES = 18
# bf16 logits and their gradient.
LOGIT_BYTES = 4


@cache
def num_parameters(spec: ModelSpec) -> int:
    """Learned numbers, tied tables counted once; needs no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LM(spec).parameters())


def num_active(spec: ModelSpec) -> int:
    """Learned numbers that one token uses: all but those of the experts that do not take it."""
    return num_parameters(spec) - sum(spec.feedforward(layer).idle(spec.dim) for layer in range(spec.layers))


def flops_per_token(spec: ModelSpec, sequence_length: int) -> int:
    """Matrix-product FLOPs of one token's forward and backward pass (backward counted as twice forward)."""
    layers = range(spec.layers)
    forward = sum(spec.mixer(layer).flops(spec.dim, sequence_length) for layer in layers)
    forward += sum(spec.feedforward(layer).flops(spec.dim) for layer in layers)
    return 3 * (forward + spec.head.flops(spec.dim, spec.vocab_size))


def memory_estimate(spec: ModelSpec, tokens: int, *, wide: bool = False) -> int:
    """Bytes that training takes with micro-batches of `tokens` tokens; `wide` when products are fp32."""
    factor = 2 if wide else 1
    per_token = spec.layers * spec.dim * ACTIVATION_BYTES * factor + spec.vocab_size * LOGIT_BYTES * factor
    return num_parameters(spec) * PARAMETER_BYTES + tokens * per_token
