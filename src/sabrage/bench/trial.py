"""A recipe made ready to be timed: built, compiled and warmed up as `sabrage train` does it.

Training never waits for the device, so neither does a timed run: steps follow each other and the clock reads
CUDA events. Off CUDA the process's own clock takes their place, which is what the tests use.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sabrage.config import resolve
from sabrage.model.counts import flops_per_token
from sabrage.optim.groups import Optimizers
from sabrage.parts import Batch, Knobs
from sabrage.recipe import Recipe
from sabrage.recipes import changed, written
from sabrage.run.device import DeviceFacts
from sabrage.train.compiling import allow_graphs
from sabrage.train.loop import build_learner, micro_batch_tokens
from sabrage.train.session import Session
from sabrage.train.step import Learner, TrainStep
from sabrage.train.warmup import made_up, warm_up
from sabrage.train.world import World

STEPS = 8
# Written so often before a piece of a step runs: empties the L2 cache, and the device stays busy until the
# host has queued the piece, as it does in a step.
FLUSH_BYTES, FLUSHES = 2**29, 12
Work = Callable[[], Any]


def asked(text: str) -> Recipe:
    """The recipe written RECIPE or RECIPE+a.b=c+d.e=f, called as it is written. Raises ConfigError."""
    return replace(changed(*written(text)), name=text).validate()


def rows_of(
    recipes: Iterable[Recipe], measure: Callable[[Recipe], Iterable[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """What `measure` tells of each recipe, printed as it comes; one that fails is a row that says so."""
    for recipe in recipes:
        try:
            yield from map(shown, measure(recipe))
        except (RuntimeError, ValueError) as error:
            # Out of memory, or what the compiler cannot do: the others are still measured.
            yield shown({"recipe": recipe.name, "note": f"failed: {str(error).splitlines()[0]}"})


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The row, after a line that tells it."""
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def times(
    work: Work, device: torch.device, *, repeats: int = STEPS, flush: Tensor | None = None
) -> list[float]:
    """Milliseconds of each of `repeats` runs of `work`, which has run before.

    On CUDA the host runs ahead; with `flush`, a piece of memory, each run also starts with cold caches.
    """
    if device.type != "cuda":
        return [clocked(work) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    events = []
    for _ in range(repeats):
        if flush is not None:
            for _ in range(FLUSHES):
                flush.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        work()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def clocked(work: Work) -> float:
    """Milliseconds of one run by the process's clock."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


@dataclass
class Trial:
    """A warm recipe on its device; `startup_seconds` is what building, compiling and warming up took."""

    recipe: Recipe
    facts: DeviceFacts
    device: torch.device
    learner: Learner
    optimizers: Optimizers
    step: TrainStep
    startup_seconds: float

    @property
    def compiles(self) -> bool:
        return self.recipe.runtime.compile == "on"

    def flush(self) -> Tensor | None:
        """Memory to write before a piece of a step; None off CUDA."""
        if self.device.type != "cuda":
            return None
        return torch.empty(FLUSH_BYTES, device=self.device, dtype=torch.uint8)

    def batch(self, knobs: Knobs) -> Batch:
        """A whole step's made-up tokens, in documents where those of the data are."""
        shape = (knobs.tokens_per_step // knobs.sequence_length, knobs.sequence_length)
        documents = self.recipe.data.separates
        return made_up(shape, self.recipe.model.vocab_size, self.device, documents=documents)

    def steps(self, knobs: Knobs) -> Work:
        """What makes the next step at each call, beginning with that of `knobs`."""
        batch, done = self.batch(knobs), iter(range(10**9))
        return lambda: self.step(batch, replace(knobs, step=knobs.step + next(done)))

    def step_ms(self, knobs: Knobs) -> float:
        """Time of a step at these knobs."""
        work = self.steps(knobs)
        work()
        return self.typical(times(work, self.device), knobs)

    def optimizer_ms(self, knobs: Knobs) -> float:
        """Time of the optimizers alone, on made-up gradients; the weights are worth nothing afterwards."""
        for parameter in self.learner.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        done = iter(range(10**9))

        def work() -> None:
            self.optimizers.step(replace(knobs, step=knobs.step + next(done)))

        work()
        found = self.typical(times(work, self.device, flush=self.flush()), knobs)
        self.optimizers.zero_grad()
        return found

    def typical(self, measured: Sequence[float], knobs: Knobs) -> float:
        """The median; the mean where some optimizer lets steps pass, so that they are not alike."""
        members, steps = self.optimizers.members, range(knobs.step, knobs.step + len(measured))
        alike = all(member.part.due(step) for member in members for step in steps)
        return statistics.median(measured) if alike else statistics.fmean(measured)

    def rates(self, knobs: Knobs, step_ms: float) -> dict[str, Any]:
        """Tokens a second, FLOP utilisation, and "floor_ms", the step at the device's peak rate, if known."""
        recipe, tokens = self.recipe, knobs.tokens_per_step
        peak = self.facts.peaks.get(recipe.precision.peak())
        flops = tokens * flops_per_token(
            recipe.model, knobs.sequence_length, recipe.objective, active=knobs.layers
        )
        floor_ms = 1e3 * flops / peak if peak else None
        return {
            "tokens_per_second": 1e3 * tokens / step_ms,
            "floor_ms": floor_ms,
            "mfu": floor_ms / step_ms if floor_ms else None,
        }


def ready(
    recipe: Recipe, facts: DeviceFacts, device: torch.device, stages: Sequence[Knobs] | None = None
) -> Trial:
    """The recipe warmed up for these stages of its plan, by default the first alone.

    Raises ConfigError for what this device cannot do and ValueError where a single row does not fit.
    """
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    recipe = resolve(recipe, facts).validate(facts)
    began = time.perf_counter()
    allow_graphs(recipe)
    world = World(device)
    learner = build_learner(recipe, world)
    masters = recipe.precision.masters()
    optimizers = Optimizers(recipe.optim, learner.named_parameters(), device, masters=masters)
    micro_tokens = micro_batch_tokens(recipe, facts, size=1)
    wanted = recipe.runtime.compile == "on"
    step = TrainStep(learner, optimizers, world, micro_tokens=micro_tokens, compile=wanted)
    warm_up(
        Session(learner, optimizers),
        step,
        stages or [recipe.plan.at(0)],
        None,
        vocab_size=recipe.model.vocab_size,
        say=print,
        documents=recipe.data.separates,
    )
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return Trial(recipe, facts, device, learner, optimizers, step, seconds)
