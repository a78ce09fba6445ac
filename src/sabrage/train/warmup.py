"""Warm-up: every shape of the plan is run once, so that nothing compiles inside the timed steps.

It trains for real on made-up tokens and then puts model, optimizer and random state back bit for bit.
"""

from collections.abc import Callable, Iterable

import torch

from sabrage.parts import Batch, Knobs
from sabrage.train.evaluate import Evaluator
from sabrage.train.session import Session
from sabrage.train.step import TrainStep


def warm_up(
    session: Session,
    step: TrainStep,
    stages: Iterable[Knobs],
    evaluator: Evaluator | None,
    *,
    vocab_size: int,
    say: Callable[[str], None],
) -> int:
    """Runs two steps of every stage, and the evaluation graph; returns the micro-batch tokens that fit.

    When the device runs out of memory the micro-batch is halved, with a message, until a step fits.
    """
    before = {name: tensor.clone() for name, tensor in session.tensors().items()}
    values = session.values()
    device, size = step.world.device, step.world.size
    seen = set()
    for knobs in stages:
        shape = (knobs.tokens_per_step // knobs.sequence_length // size, knobs.sequence_length)
        if shape in seen:
            continue
        seen.add(shape)
        tokens_BT = torch.randint(vocab_size, shape, device=device)
        batch = Batch(tokens_BT, tokens_BT.roll(-1, 1))
        while not fits(step, batch, knobs):
            least = knobs.sequence_length
            if step.micro_tokens <= least:
                raise ValueError(
                    f"one row of {least:,} tokens does not fit into this device's memory; use a smaller "
                    "model (--set model.layers=..., model.dim=...) or a shorter plan.sequence_length"
                )
            step.micro_tokens = max(step.micro_tokens // 2, least)
            step.optimizers.zero_grad()
            say(
                f"out of memory; going on with {step.micro_tokens // least} rows a micro-batch "
                f"(to start there next time: --set runtime.micro_batch={step.micro_tokens // least})"
            )
    if evaluator is not None:
        evaluator.batch_rows = max(min(evaluator.batch_rows, step.micro_tokens // evaluator.length), 1)
        with torch.no_grad():
            tokens_BT, targets_BT = next(evaluator.batches())
            evaluator.model.eval()
            evaluator.score(tokens_BT, targets_BT)
            evaluator.model.train()
    session.load(before, values)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return step.micro_tokens


def fits(step: TrainStep, batch: Batch, knobs: Knobs) -> bool:
    """Runs the step twice (gradients appear in the first); False when it runs out of device memory."""
    try:
        for _ in range(2):
            step(batch, knobs)
        if step.world.device.type == "cuda":
            torch.cuda.synchronize(step.world.device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
