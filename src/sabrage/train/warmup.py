"""Warm-up: every shape of the plan is run once, so that nothing compiles inside the timed steps.

It trains for real on made-up tokens and then puts model, optimizer and random state back bit for bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from sabrage.parts import Batch, Knobs
from sabrage.train.evaluate import Evaluator
from sabrage.train.session import Session
from sabrage.train.step import TrainStep, micro_rows


def warm_up(
    session: Session,
    step: TrainStep,
    stages: Iterable[Knobs],
    evaluator: Evaluator | None,
    *,
    vocab_size: int,
    say: Callable[[str], None],
) -> int:
    """Runs every stage's shapes, and the evaluation graph; returns the micro-batch tokens that fit.

    When the device runs out of memory the micro-batch is halved, with a message, until a step fits.
    """
    before = {name: tensor.clone() for name, tensor in session.tensors().items()}
    values = session.values()
    device, size = step.world.device, step.world.size
    seen = set()
    for knobs in stages:
        rows, length = knobs.tokens_per_step // knobs.sequence_length // size, knobs.sequence_length
        if (rows, length) in seen:
            continue
        seen.add((rows, length))
        while not fits(step, rows, knobs, vocab_size=vocab_size):
            if step.micro_tokens <= length:
                raise ValueError(
                    f"one row of {length:,} tokens does not fit into this device's memory; use a smaller "
                    "model (--set model.layers=..., model.dim=...) or a shorter plan.sequence_length"
                )
            step.micro_tokens = max(step.micro_tokens // 2, length)
            step.optimizers.zero_grad()
            say(
                f"out of memory; going on with {step.micro_tokens // length} rows a micro-batch "
                f"(to start there next time: --set runtime.micro_batch={step.micro_tokens // length})"
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


def fits(step: TrainStep, rows: int, knobs: Knobs, *, vocab_size: int) -> bool:
    """Runs micro-batches and updates as in a step of that many rows; False when memory runs out.

    Two micro-batches show all: gradients appear in the first and are added to in the second. Updates are
    repeated until every optimizer has had its turn.
    """
    length, device = knobs.sequence_length, step.world.device
    micro = micro_rows(torch.Size((rows, length)), step.micro_tokens)
    tokens_BT = torch.randint(vocab_size, (min(rows, 2 * micro), length), device=device)
    members = step.optimizers.members
    rounds = 1 + max(next(n for n in range(1000) if member.part.due(knobs.step + n)) for member in members)
    try:
        for offset in range(rounds):
            step(Batch(tokens_BT, tokens_BT.roll(-1, 1)), replace(knobs, step=knobs.step + offset))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
