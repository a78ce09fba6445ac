"""What a run tells: manifest, log, progress, tracker, checkpoints and result; the leading process writes."""

import math
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch

from sabrage.config import diff, to_json
from sabrage.model.counts import flops_per_token, num_active, num_parameters
from sabrage.model.legality import Legality
from sabrage.parts import Corpus, Knobs
from sabrage.recipe import Recipe
from sabrage.run import checkpoint
from sabrage.run.checkpoint import CheckpointError
from sabrage.run.clocks import Clocks
from sabrage.run.device import DeviceFacts
from sabrage.run.folder import RunFolder, write_json
from sabrage.run.log import Log
from sabrage.run.manifest import make_manifest
from sabrage.train.blended import Blended, save
from sabrage.train.progress import Progress
from sabrage.train.session import Session
from sabrage.train.trackers import make_tracker
from sabrage.train.world import World


class Recorder:
    """Writes the run folder while the run goes on; `resolved` is `recipe` with every "auto" decided."""

    def __init__(
        self,
        recipe: Recipe,
        resolved: Recipe,
        folder: RunFolder,
        corpus: Corpus,
        world: World,
        facts: DeviceFacts,
        clocks: Clocks,
        legality: Legality | None,
        *,
        tracker: str,
        resume: bool,
    ) -> None:
        self.recipe, self.resolved, self.folder = recipe, resolved, folder
        self.corpus, self.world, self.legality = corpus, world, legality
        self.facts, self.clocks, self.tracker_name, self.resume = facts, clocks, tracker, resume
        self.validation_loss: float | None = None
        self.network_loss: float | None = None
        self.at_validation: dict[str, float | None] = {}
        self.by_position: list[tuple[int, int, float]] = []
        self.step_seconds: list[float] = []
        self.tokens = 0
        self.last_seconds = 0.0
        self.stack = ExitStack()
        rate = facts.peaks.get(recipe.precision.peak())
        self.peak = rate * world.size if rate else None

    def __enter__(self) -> Self:
        if not self.world.leads:
            return self
        path = self.folder.path
        path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self.progress = stack.enter_context(Progress(total=self.recipe.last_step()))
            # Before the manifest: a folder in which nothing was begun can be used by the next attempt.
            tracker = make_tracker(self.tracker_name, path, config=to_json(self.recipe), say=self.message)
            self.tracker = stack.enter_context(tracker)
            if not self.resume:
                write_json(self.folder.manifest, self.manifest())
            self.log = stack.enter_context(Log(self.folder.log))
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def manifest(self) -> dict[str, Any]:
        """What is known before the first step; "inline" marks a run beside others."""
        backends = {path: str(chosen) for path, _, chosen in diff(self.recipe, self.resolved)}
        made = make_manifest(
            to_json(self.recipe),
            seed=self.recipe.budget.seed,
            device=self.facts,
            backends=backends,
            data=self.corpus.fingerprint,
        )
        return made | {
            "track": self.corpus.track,
            "parameters": num_parameters(self.recipe.model),
            "active_parameters": num_active(self.recipe.model),
            "processes": self.world.size,
            **({"inline": True} if self.clocks.inline else {}),
            "legality": self.legality.to_json() if self.legality else None,
        }

    def message(self, text: str) -> None:
        """Tells the user one sentence."""
        if self.world.leads:
            self.progress.message(text)

    def started(self) -> None:
        """Notes how long each stage of the start-up took, in seconds."""
        if self.world.leads:
            self.log.write("start", **{f"{name}_seconds": lap for name, lap in self.clocks.laps.items()})

    def trained(self, step: int, losses: list[float], knobs: Knobs, readings: dict[str, float]) -> None:
        """Notes the losses of the steps that end with `step` updates, and what else was read there."""
        seconds = self.clocks.train_seconds
        interval, self.last_seconds = seconds - self.last_seconds, seconds
        steps = range(step - len(losses), step)
        tokens = sum(self.recipe.plan.at(number).tokens_per_step for number in steps)
        self.tokens += tokens
        self.step_seconds += [interval / len(losses)] * len(losses)
        if not self.world.leads:
            return
        speed = tokens / interval if interval > 0 else 0.0
        for number, loss in zip(steps, losses, strict=True):
            self.log.write("train", step=number, loss=loss, lr=self.recipe.plan.at(number).lr)
        mfu, memory = self.utilisation(steps, interval), self.peak_memory()
        status = {"tokens_per_second": speed, "mfu": mfu, "memory": memory}
        self.log.write("speed", step=step, tokens=self.tokens, train_seconds=seconds, **status, **readings)
        self.tracker.record(step, {"train/loss": losses[-1], "lr": knobs.lr, "tokens_per_second": speed})
        self.progress.update(step=step, loss=losses[-1], tokens_per_second=speed, mfu=mfu, memory=memory)

    def validated(self, step: int, loss: float, network_loss: float | None = None) -> None:
        """Notes a validation after `step` updates, and what the clocks showed when its result was known.

        `network_loss` is that of the network alone, where `loss` is that of the recipe's blend.
        """
        self.validation_loss, self.network_loss = loss, network_loss
        self.at_validation = self.clocks.readings()
        if self.world.leads:
            alone = {} if network_loss is None else {"network_loss": network_loss}
            tokens, clocks = self.tokens, self.at_validation
            self.log.write("validation", step=step, loss=loss, tokens=tokens, **alone, **clocks)
            self.tracker.record(step, {"validation/loss": loss})
            self.progress.validation(step, loss, network_loss)

    def keep(self, blended: Blended, step: int) -> None:
        """Notes how long its parts took and writes the blend; on a full disk the run goes on without."""
        self.log.write("blend", step=step, **{f"{name}_seconds": n for name, n in blended.seconds.items()})
        try:
            save(self.folder.path, blended, step=step)
        except CheckpointError as error:
            self.log.write("checkpoint_failed", step=step, error=str(error))
            self.message(str(error))

    def told_by_position(self, stretches: list[tuple[int, int, float]]) -> None:
        """Notes the losses of the last validation by the position in the row: (first, end, loss)."""
        self.by_position = stretches

    def reached(self, target: float | None) -> bool:
        """Whether the newest validation loss is at or below the target."""
        return target is not None and self.validation_loss is not None and self.validation_loss <= target

    def save(self, session: Session) -> None:
        """Writes a checkpoint; when the disk is full the run goes on with the last good one."""
        if not self.world.leads:
            return
        meta = session.values() | {
            "clocks": self.clocks.state(),
            "tokens": self.tokens,
            "validation_loss": self.validation_loss,
            "at_validation": self.at_validation,
            "recipe": to_json(self.recipe),
        }
        keep = self.recipe.budget.keep_checkpoints
        try:
            where = self.folder.checkpoints
            checkpoint.save(where, step=session.step, tensors=session.tensors(), meta=meta, keep=keep)
        except CheckpointError as error:
            self.log.write("checkpoint_failed", step=session.step, error=str(error))
            self.message(f"no checkpoint at step {session.step}: {error}")
            return
        self.log.write("checkpoint", step=session.step)

    def restore(self, session: Session) -> None:
        """Puts the newest good checkpoint into `session`; without any, the run starts at step 0 again."""
        saved = checkpoint.load_newest(self.folder.checkpoints, warn=self.message)
        if saved is not None:
            session.load(saved.tensors, saved.meta)
            self.clocks.restore(saved.meta["clocks"])
            self.tokens, self.validation_loss = saved.meta["tokens"], saved.meta["validation_loss"]
            self.at_validation = saved.meta["at_validation"]
            self.last_seconds = self.clocks.train_seconds
        if self.world.leads and session.step < self.recipe.last_step():
            self.folder.result.unlink(missing_ok=True)
            self.log.write("resume", step=session.step)
            self.message(f"going on after step {session.step:,}")

    def not_finite(self, step: int, losses: list[float]) -> str:
        """What to say when a loss, or else the weights after `step` updates, is not finite; it is noted."""
        first = step - len(losses)
        bad = [first + index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        what = f"the loss of step {bad[0]} is" if bad else f"the weights after {step} steps are"
        good = checkpoint.newest_step(self.folder.checkpoints)
        kept = (
            "there is no checkpoint" if good is None else f"the last good checkpoint is that of step {good}"
        )
        if self.world.leads:
            self.log.write("not_finite", step=bad[0] if bad else step)
        self.finish("not_finite", step)
        return (
            f"{what} not finite; {kept} in {self.folder.checkpoints}. "
            "Try a lower learning rate (--set optim.0.optimizer.lr=...), a longer warm-up "
            "(--set plan.lr.warmup=...), or --set precision=Fp32 to see whether the number format is to blame"
        )

    def finish(self, ending: str, steps: int) -> None:
        """Writes result.json; where a finished run was resumed and no step made, the old one stands."""
        if not self.world.leads or (not self.step_seconds and self.folder.result.exists()):
            return
        seconds = self.clocks.train_seconds
        speed = self.tokens / seconds if seconds > 0 else 0.0
        inline = {"inline": True} if self.clocks.inline else {}
        write_json(
            self.folder.result,
            {
                "recipe": self.recipe.name,
                "track": self.corpus.track,
                "ending": ending,
                "steps": steps,
                "seed": self.recipe.budget.seed,
                "tokens": self.tokens,
                "validation_loss": self.validation_loss,
                **({} if self.network_loss is None else {"network_loss": self.network_loss}),
                **({"by_position": self.by_position} if self.by_position else {}),
                **(self.at_validation or self.clocks.readings()),
                "tokens_per_second": speed,
                "median_step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
                "mfu": self.utilisation(range(steps), seconds),
                "peak_memory": self.peak_memory(),
                "device": self.facts.name,
                **inline,
                "processes": self.world.size,
                "warmup_seconds": self.clocks.seconds("warm-up"),
                "validation_seconds": self.clocks.seconds("validation"),
            },
        )

    def utilisation(self, steps: Iterable[int], seconds: float) -> float | None:
        """Model FLOP utilisation of these steps against the device's peak; None where that is not known."""
        if self.peak is None or seconds <= 0:
            return None
        model, objective = self.recipe.model, self.recipe.objective
        flops = 0
        for knobs in map(self.recipe.plan.at, steps):
            per_token = flops_per_token(model, knobs.sequence_length, objective, active=knobs.layers)
            flops += per_token * knobs.tokens_per_step
        return flops / seconds / self.peak

    def peak_memory(self) -> int | None:
        """The most device memory allocated so far, in bytes; None off CUDA."""
        device = self.world.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
