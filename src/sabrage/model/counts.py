"""What a model costs: parameters, FLOPs per token, and an estimate of memory."""

from functools import cache

import torch

from sabrage.losses import Objective
from sabrage.model.depth import active_layers
from sabrage.model.lm import LM, ModelSpec

# Bytes of saved activations per token, layer and unit of width, bf16 autocast over an fp32 residual
# stream, compiled: fitted to the 16.7, 31.1 and 60.0 GiB that the NoCap baseline takes at 32, 64 and 128
# rows of 1,024 (one H200, torch 2.11). Of `fast` (32 rows of 2,048) and `fast-24gb` (15 layers, 8 rows),
# whose heads hold few logits, 29.0 and 12.7 GiB were measured and are estimated as 28.0 and 13.5.
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


@cache
def objective_parameters(objective: Objective, spec: ModelSpec) -> int:
    """Learned numbers that the objective adds in training; needs no memory."""
    with torch.device("meta"):
        module = objective.build(dim=spec.dim, vocab_size=spec.vocab_size)
        return sum(parameter.numel() for parameter in module.parameters())


def flops_per_token(
    spec: ModelSpec, sequence_length: int, objective: Objective | None = None, *, active: int | None = None
) -> int:
    """Matrix-product FLOPs of one token's forward and backward pass (backward counted as twice forward).

    With the `objective` those of training, without it those of the model; `active` layers work, None: all.
    """
    layers = active_layers(spec.layers, spec.layers if active is None else active)
    forward = sum(spec.mixer(layer).flops(spec.dim, sequence_length) for layer in layers)
    forward += sum(spec.feedforward(layer).flops(spec.dim) for layer in layers)
    forward += spec.last.flops(spec.dim, sequence_length) if spec.last else 0
    head = spec.head.flops(spec.dim, spec.vocab_size, training=objective is not None)
    extra = objective.flops(spec.dim, sequence_length, head) if objective else 0
    return 3 * (forward + head + extra)


def memory_estimate(
    spec: ModelSpec, tokens: int, *, objective: Objective | None = None, wide: bool = False
) -> int:
    """Bytes that training takes with micro-batches of `tokens` tokens; `wide` when products are fp32."""
    factor = 2 if wide else 1
    extra = objective.extra_heads() if objective else 0
    activations = tokens * (spec.layers + extra) * spec.dim * ACTIVATION_BYTES
    logits = min(tokens, spec.head.logit_tokens or tokens) * (1 + extra) * spec.vocab_size * LOGIT_BYTES
    parameters = num_parameters(spec) + (objective_parameters(objective, spec) if objective else 0)
    return parameters * PARAMETER_BYTES + (activations + logits) * factor
