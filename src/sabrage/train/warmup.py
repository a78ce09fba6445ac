"""Warm-up: every shape of the plan is run once, so that nothing compiles inside the timed steps.

It trains for real on made-up tokens and then puts model, optimizer and random state back bit for bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from sabrage.parts import Batch, Knobs
from sabrage.train.evaluate import Evaluator
from sabrage.train.session import Session
from sabrage.train.step import TrainStep, micro_rows
from sabrage.train.world import World

SMALLER = "use a smaller model (--set model.layers=..., model.dim=...) or a shorter"


def warm_up(
    session: Session,
    step: TrainStep,
    stages: Iterable[Knobs],
    evaluator: Evaluator | None,
    *,
    vocab_size: int,
    say: Callable[[str], None],
    documents: bool = False,
) -> int:
    """Runs every stage's shapes, and the evaluation graphs; returns the micro-batch tokens that fit.

    With `documents` batches say which document each token belongs to, as those of the data will.

    When a device runs out of memory the micro-batch is halved on all of them, with a message, and every
    stage is run again. Raises ValueError where a single row does not fit.
    """
    before = {name: remembered(tensor) for name, tensor in session.tensors().items()}
    values = session.values()
    shapes: dict[tuple[int | None, ...], Knobs] = {}
    for knobs in stages:
        shape = (knobs.tokens_per_step, knobs.sequence_length, knobs.window, knobs.layers)
        shapes.setdefault(shape, knobs)
    longest = max(knobs.sequence_length for knobs in shapes.values())

    def too_large() -> Knobs | None:
        """The first shape that does not fit."""
        tries = (knobs for knobs in shapes.values() if not fits(step, knobs, vocab_size, documents=documents))
        return next(tries, None)

    while large := too_large():
        halve(step, large, longest=longest, say=say)
    if evaluator is not None:
        evaluator.batch_rows = max(min(evaluator.batch_rows, step.micro_tokens // evaluator.length), 1)
        while not scores(evaluator):
            if evaluator.batch_rows == 1:
                raise ValueError(
                    f"scoring one row of {evaluator.length:,} tokens does not fit into this device's memory; "
                    f"{SMALLER} budget.evaluation_length"
                )
            evaluator.batch_rows //= 2
            say(f"out of memory in validation; going on with {evaluator.batch_rows} rows at a time")
    session.load(before, values)
    if step.world.device.type == "cuda":
        torch.cuda.synchronize(step.world.device)
    return step.micro_tokens


def remembered(tensor: Tensor) -> Tensor:
    """A copy; of nothing but zeros, such as moments before the first step, one that takes no memory.

    On a card of 24 GB copies of all moments would be what decides how many rows fit.
    """
    if tensor.is_floating_point() and not (tensor.any() or tensor.signbit().any()):
        return tensor.new_zeros(()).expand(tensor.shape)
    return tensor.clone()


def rows_of(step: TrainStep, knobs: Knobs) -> tuple[int, int]:
    """Rows of this process's share of a step, and of its micro-batches."""
    rows = knobs.tokens_per_step // knobs.sequence_length // step.world.size
    return rows, micro_rows(torch.Size((rows, knobs.sequence_length)), step.micro_tokens)


def halve(step: TrainStep, knobs: Knobs, *, longest: int, say: Callable[[str], None]) -> None:
    """Makes micro-batches of this stage at most half as large. Raises ValueError when they are one row."""
    length = knobs.sequence_length
    _, micro = rows_of(step, knobs)
    if micro == 1:
        raise ValueError(
            f"one row of {length:,} tokens does not fit into this device's memory; "
            f"{SMALLER} plan.sequence_length"
        )
    step.micro_tokens = micro // 2 * length
    # The rows of a step may have no such divisor.
    _, micro = rows_of(step, knobs)
    step.micro_tokens = micro * length
    step.optimizers.zero_grad()
    # The recipe counts rows of its longest sequences.
    setting = max(step.micro_tokens // longest, 1)
    say(
        f"out of memory; going on with {micro} rows of {length:,} tokens a micro-batch "
        f"(to start there next time: --set runtime.micro_batch={setting})"
    )


def fits(step: TrainStep, knobs: Knobs, vocab_size: int, *, documents: bool) -> bool:
    """Runs micro-batches and updates as in a step of these knobs; False where memory runs out on any process.

    Two micro-batches show all: gradients appear in the first and are added to in the second. Updates are
    repeated until every optimizer has had its turn.
    """
    rows, micro = rows_of(step, knobs)
    shape = (min(rows, 2 * micro), knobs.sequence_length)
    members = step.optimizers.members
    rounds = 1 + max(next(n for n in range(1000) if member.part.due(knobs.step + n)) for member in members)

    def trial() -> None:
        batch = made_up(shape, vocab_size, step.world.device, documents=documents)
        for offset in range(rounds):
            step(batch, replace(knobs, step=knobs.step + offset))

    world = step.world
    # Alone, since a process that ran out of memory would not come to the collectives of the others.
    step.world = replace(world, size=1)
    try:
        return enough_memory(trial, world)
    finally:
        step.world = world


def made_up(
    shape: tuple[int, int], vocab_size: int, device: torch.device, *, documents: bool = False
) -> Batch:
    """A batch of random tokens, with `documents` four to a row."""
    tokens_BT, documents_BT = torch.randint(vocab_size, shape, device=device), None
    if documents:
        time_T = torch.arange(shape[1], dtype=torch.int32, device=device)
        documents_BT = (time_T * 4 // shape[1]).expand(shape).contiguous()
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), documents_BT)


@torch.no_grad()
def scores(evaluator: Evaluator) -> bool:
    """Runs the evaluation graphs; False where memory runs out on any process."""
    evaluator.model.eval()
    batch = next(evaluator.batches())
    try:
        return enough_memory(
            lambda: [evaluator.score(*batch, *shape) for shape in evaluator.shapes], evaluator.world
        )
    finally:
        evaluator.model.train()


def enough_memory(trial: Callable[[], object], world: World) -> bool:
    """Whether every process has the memory for `trial`, which must hold no collective."""
    try:
        trial()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        short = False
    except torch.cuda.OutOfMemoryError:
        short = True
    # Only here does nothing hold on to the frames of the trial.
    if short and world.device.type == "cuda":
        torch.cuda.empty_cache()
    return not world.any(short)
