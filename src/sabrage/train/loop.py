"""The training loop, in the order in which things happen. Read model/lm.py first."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sabrage.config import ConfigError, resolve
from sabrage.data.stream import Loader
from sabrage.model.counts import memory_estimate
from sabrage.model.lm import LM, build_model
from sabrage.optim.groups import Optimizers
from sabrage.parts import Batch, Corpus, Knobs
from sabrage.recipe import Recipe
from sabrage.run.clocks import Clocks
from sabrage.run.device import DeviceFacts, probe
from sabrage.run.folder import RunFolder
from sabrage.run.turn import turn
from sabrage.train.blended import blend, check_room
from sabrage.train.compiling import allow_graphs, use_compile_cache
from sabrage.train.evaluate import Evaluator
from sabrage.train.examined import examined
from sabrage.train.interrupt import Interruption
from sabrage.train.recorder import Recorder
from sabrage.train.session import Session
from sabrage.train.step import Learner, TrainStep
from sabrage.train.warmup import warm_up
from sabrage.train.workshop import Shelf, Workshop, blueprint
from sabrage.train.world import World


class TrainingStopped(ValueError):
    """Training cannot go on: names the step, the last good checkpoint and what to try."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended ("done", "target", "until" or "interrupted"), its last validation loss (nats), steps.

    `signal` is the one that interrupted this process, or None.
    """

    ending: str
    validation_loss: float | None
    steps: int
    signal: int | None = None


def train(
    recipe: Recipe,
    *,
    folder: RunFolder,
    corpus: Corpus,
    world: World,
    resume: bool = False,
    tracker: str = "none",
    clocks: Clocks | None = None,
    shelf: Shelf | None = None,
) -> Outcome:
    """Runs `recipe` to its last step, its target or an interruption, and leaves everything in `folder`.

    What the `shelf` holds of an earlier run is used again where this one would build the very same. Raises
    ConfigError for what cannot run and TrainingStopped when loss or weights are no longer finite.
    """
    clocks = clocks or Clocks()
    clocks.lap("process")
    facts = probe(world.device)
    asked, recipe = recipe, resolve(recipe, facts).validate(facts)
    check_data(recipe, corpus, world)
    shelf, plan = shelf or Shelf(), blueprint(recipe, world)
    legality = None if resume else shelf.verdict(plan, partial(examined, asked))
    clocks.lap("checks")
    use_compile_cache(recipe.runtime.compile == "on")
    allow_graphs(recipe)

    workshop = set_up(recipe, corpus, world, facts, shelf)
    step, evaluator = workshop.step, workshop.evaluator
    session = workshop.begin(recipe)
    clocks.lap("model")

    with Recorder(
        asked, recipe, folder, corpus, world, facts, clocks, legality, tracker=tracker, resume=resume
    ) as recorder:
        if workshop.used:
            recorder.message("using the model and the compiled graphs of an earlier run of this process")
        clocks.lap("manifest")
        clocks.start_nocap()
        if recipe.runtime.compile == "on" or facts.kind == "cuda":
            with clocks.phase("warm-up"):
                stages, vocab_size = recipe.plan.stages(), corpus.vocab_size
                warm_up(
                    session,
                    step,
                    stages,
                    evaluator,
                    vocab_size=vocab_size,
                    say=recorder.message,
                    documents=recipe.data.separates,
                )
        clocks.lap("warm-up")
        recorder.started()
        if resume:
            recorder.restore(session)
        # Nothing is lost by whoever is stopped while it waits.
        with turn(), Interruption() as stop:
            ending = run_steps(recipe, session, step, evaluator, corpus, recorder, clocks, stop)
            recorder.finish(ending, session.step)
        return Outcome(ending, recorder.validation_loss, session.step, stop.signal)


def run_steps(
    recipe: Recipe,
    session: Session,
    step: TrainStep,
    evaluator: Evaluator,
    corpus: Corpus,
    recorder: Recorder,
    clocks: Clocks,
    stop: Interruption,
) -> str:
    """The loop itself; returns how it ended."""
    plan, budget, world = recipe.plan, recipe.budget, step.world
    losses: list[Tensor] = []
    end = recipe.last_step()
    ending = "done" if end == plan.steps else "until"
    if session.step >= end:
        return ending
    with make_loader(recipe, corpus, world, step=session.step, block=session.block) as loader:
        clocks.start("train")
        while session.step < end:
            knobs = plan.at(session.step)
            batch = Batch(*next(loader))
            losses.append(step(batch, knobs))
            session.step, session.block = loader.next_step, loader.next_block

            last = session.step == end
            evaluating = last or due(session.step, budget.evaluate_every)
            saving = last or due(session.step, budget.checkpoint_every)
            pausing = evaluating or saving or due(session.step, budget.log_every)
            # Asking other processes waits for the device, so it is done only where the loop waits anyway.
            stopping = (pausing or world.size == 1) and world.any(stop.signal is not None)
            if pausing or stopping:
                values = torch.stack(losses).tolist()
                losses.clear()
                clocks.stop()
                recorder.trained(session.step, values, knobs, step.readings())
                keeping = saving or stopping
                if not all(map(math.isfinite, values)) or (keeping and not session.is_finite()):
                    raise TrainingStopped(recorder.not_finite(session.step, values))
                if evaluating:
                    validate(recipe, session, evaluator, corpus, recorder, clocks)
                reached = evaluating and recorder.reached(budget.target)
                if keeping or reached:
                    with clocks.phase("checkpoint"):
                        recorder.save(session)
                if reached and not last:
                    return "target"
                if stopping and not last:
                    return "interrupted"
                clocks.start("train")
        clocks.stop()
    return ending


def validate(
    recipe: Recipe,
    session: Session,
    evaluator: Evaluator,
    corpus: Corpus,
    recorder: Recorder,
    clocks: Clocks,
) -> None:
    """Scores the validation split; after the last step with the recipe's blend, if it has one."""
    shape, last = recipe.evaluation_shape(session.step), session.step == recipe.plan.steps
    blended = None
    if last and recipe.blend:
        with clocks.phase("train"):
            blended = blend(recipe, evaluator, corpus, session.block, say=recorder.message)
    if blended:
        with clocks.phase("validation"):
            loss, network_loss = blended.losses()
        recorder.validated(session.step, loss, network_loss)
        with clocks.phase("checkpoint"):
            recorder.keep(blended, session.step)
    else:
        with clocks.phase("validation"):
            loss = evaluator(*shape)
        recorder.validated(session.step, loss)
    if last and recipe.budget.by_position:
        with clocks.phase("validation"):
            recorder.told_by_position(evaluator.by_position(*shape))


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step` steps."""
    return every > 0 and step % every == 0


def set_up(recipe: Recipe, corpus: Corpus, world: World, facts: DeviceFacts, shelf: Shelf) -> Workshop:
    """Learner, step and evaluator, the learner as its seed draws it: built here, or the shelf's renewed."""
    key = blueprint(recipe, world)
    workshop = shelf.take(key)
    learner = build_learner(recipe, world)
    recipe.objective.read(learner.objective, corpus.tokenizer)
    if workshop is not None:
        workshop.renew(learner)
        return workshop
    micro_tokens, compile = micro_batch_tokens(recipe, facts, size=world.size), recipe.runtime.compile == "on"
    none = Optimizers((), (), world.device)
    step = TrainStep(learner, none, world, micro_tokens=micro_tokens, compile=compile)
    evaluator = make_evaluator(recipe, learner.model, world, corpus, micro_tokens=micro_tokens)
    shelf.keep(key, workshop := Workshop(learner, step, evaluator))
    return workshop


def build_learner(recipe: Recipe, world: World) -> Learner:
    """Model and objective on the device, weights drawn from the recipe's seed."""
    spec, seed = recipe.model, recipe.budget.seed
    model = build_model(spec, seed=seed)
    torch.manual_seed(seed)
    objective = recipe.objective.build(dim=spec.dim, vocab_size=spec.vocab_size)
    learner = Learner(model, objective, recipe.precision, world.device).to(world.device)
    recipe.precision.prepare(learner, world.device)
    return learner


def check_data(recipe: Recipe, corpus: Corpus, world: World) -> None:
    """Reads a step of every stage, so that data which does not fit is refused before anything compiles."""
    if corpus.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            f"the data has {corpus.vocab_size:,} token ids and the model {recipe.model.vocab_size:,}; use "
            f"--set model.vocab_size={corpus.vocab_size}, or the data that the model is meant for"
        )
    check_room(recipe, corpus, world)
    for knobs in recipe.plan.stages():
        with make_loader(recipe, corpus, world, step=knobs.step, block=0) as loader:
            next(loader)


def make_loader(recipe: Recipe, corpus: Corpus, world: World, *, step: int, block: int) -> Loader:
    """The training stream from a step and its first block on, prefetched."""

    def shapes(step: int) -> tuple[int, int]:
        knobs: Knobs = recipe.plan.at(step)
        return knobs.sequence_length, knobs.tokens_per_step

    return Loader(
        corpus.train,
        shapes=shapes,
        start_step=step,
        start_block=block,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        order=recipe.data.order,
        end_of_text=corpus.end_of_text,
    )


def make_evaluator(
    recipe: Recipe, model: LM, world: World, corpus: Corpus, *, micro_tokens: int
) -> Evaluator:
    """The fixed metric of this recipe, in every window and depth that the run will ask for."""
    return Evaluator(
        model,
        recipe.precision,
        world,
        corpus.validation,
        num_targets=recipe.budget.evaluation_tokens,
        length=recipe.budget.evaluation_length,
        batch_tokens=micro_tokens,
        compile=recipe.runtime.compile == "on",
        shapes=recipe.evaluation_shapes(),
        end_of_text=corpus.end_of_text if recipe.budget.evaluation_documents else None,
    )


def micro_batch_tokens(recipe: Recipe, facts: DeviceFacts, *, size: int) -> int:
    """Tokens of one forward pass: as recipe.runtime says, or as many as the device's memory takes.

    `size` processes share the step. More than 65,536 tokens at once bring no speed (measured on an H200:
    503k, 501k and 504k tokens/s with 32, 64 and 128 rows), and on a CPU more than 8,192 cost cache misses.
    """
    stages = recipe.plan.stages()
    length = max(knobs.sequence_length for knobs in stages)
    if recipe.runtime.micro_batch:
        return recipe.runtime.micro_batch * length
    if facts.kind == "cpu":
        return max(8192, length)
    room = facts.memory * recipe.runtime.memory_fraction
    wide = recipe.precision.wide()
    tokens, objective = min(max(knobs.tokens_per_step for knobs in stages) // size, 65_536), recipe.objective
    while tokens > length and memory_estimate(recipe.model, tokens, objective=objective, wide=wide) > room:
        tokens //= 2
    return max(tokens, length)
