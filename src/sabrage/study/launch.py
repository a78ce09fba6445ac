"""Runs as processes, one at a time on every device; they resume, and fail each for itself.

A block is a list of jobs that follow each other on one device, such as all variants of one seed, so that
their timings pair. `Local` gives every GPU of this machine its next block; `OnRay` hands blocks to a Ray
cluster. Whatever launches them, the runs land in the same folders.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sabrage.config import Part
from sabrage.run.folder import RunFolder, write_json
from sabrage.run.turn import TURN, turn_file
from sabrage.study.plan import StudyError, Variant
from sabrage.study.workplace import Fresh, Kept, Work, Workplace
from sabrage.train.interrupt import Interruption

SECONDS_BETWEEN_LOOKS = 0.05
GPU = "CUDA_VISIBLE_DEVICES"
LAST_LINES = 20
# Of a run that came to its end, and of one that went as far as it was to go.
WHOLE = ("done", "target")
ENDINGS = (*WHOLE, "until")
Block = Sequence["Job"]


@dataclass(frozen=True)
class Job:
    """One variant with one seed, run in `folder`; what the process prints goes to `output` beside it."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def output(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def failure(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.failed.json")

    def state(self) -> Literal["done", "failed", "started", "waiting"]:
        """What the files say; a run that ended early by a signal is "started"."""
        result = RunFolder(self.folder).result
        if result.is_file() and json.loads(result.read_text())["ending"] in ENDINGS:
            return "done"
        if self.failure.is_file():
            return "failed"
        return "started" if self.folder.is_dir() else "waiting"

    def fail(self, reason: str, lines: Sequence[str] = ()) -> None:
        """Notes why the run did not end well; the next attempt removes the note."""
        self.failure.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.failure, {"reason": reason, "last_lines": list(lines)})


class Attempt:
    """Work on a job, going on from its newest checkpoint where there is one."""

    def __init__(self, job: Job, *, launcher: "Launcher", place: Workplace) -> None:
        self.job, self.launcher = job, launcher
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with job.output.open("ab") as output:
            # Whoever works on the job gets the lock too and holds it also when this process dies.
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StudyError(
                    f"a process of an earlier call still works on {job.folder}; wait for it, or end it"
                ) from error
            job.failure.unlink(missing_ok=True)
            self.process: Work = place.start(self.arguments(), output)

    def arguments(self) -> list[str]:
        """What follows `sabrage`; a folder without a checkpoint is emptied and its run starts anew."""
        job, folder = self.job, RunFolder(self.job.folder)
        common = ["train", job.variant.recipe, "--out", str(folder.path)]
        if folder.manifest.is_file() and any(folder.checkpoints.glob("step-*")):
            return [*common, "--resume"]
        if folder.path.exists():
            shutil.rmtree(folder.path)
        sets = [word for assignment in job.variant.sets for word in ("--set", assignment)]
        return [*common, *sets, "--seed", str(job.seed)]

    def ended(self, *, stopping: bool) -> bool:
        """Whether the work is over; notes the failure of a run that was not stopped on purpose."""
        code = self.process.poll()
        if code is None:
            return False
        if self.job.state() == "done":
            if not self.launcher.keep_checkpoints:
                shutil.rmtree(RunFolder(self.job.folder).checkpoints, ignore_errors=True)
        elif not stopping:
            lines = self.job.output.read_text(errors="replace").splitlines()
            self.job.fail(f"exit code {code}", lines[-LAST_LINES:])
        return True


def run_blocks(
    blocks: Sequence[Block],
    *,
    launcher: "Launcher",
    places: Sequence[dict[str, str]],
    watch: Callable[[], None],
) -> bool:
    """Runs every job that is not done, block by block, at each of `places` one at a time.

    A place is what its children's environment adds; places that take turns share a block. After Ctrl-C or
    SIGTERM no job is started, the running ones save and end, and the answer is False; a second one kills
    them.
    """
    waiting = deque(deque(job for job in block if job.state() != "done") for block in blocks)
    shared: dict[str, deque[Job]] = {}
    at_hand = [shared.setdefault(place.get(TURN, str(index)), deque()) for index, place in enumerate(places)]
    running: list[Attempt | None] = [None for _ in places]
    passed_on = False
    workplaces = [launcher.workplace(place) for place in places]
    with Interruption() as stop:
        try:
            while True:
                stopping = stop.signal is not None
                for index, workplace in enumerate(workplaces):
                    attempt = running[index]
                    if attempt and attempt.ended(stopping=stopping):
                        running[index] = attempt = None
                    while waiting and not at_hand[index]:
                        at_hand[index].extend(waiting.popleft())
                    if attempt is None and at_hand[index] and not stopping:
                        job = at_hand[index].popleft()
                        running[index] = Attempt(job, launcher=launcher, place=workplace)
                if stopping and not passed_on:
                    passed_on = True
                    for attempt in filter(None, running):
                        attempt.process.send_signal(signal.SIGTERM)
                watch()
                if not any(running) and (stopping or not any([*waiting, *at_hand])):
                    return not stopping
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            for attempt in filter(None, running):
                attempt.process.kill()
                attempt.process.wait()
            for workplace in workplaces:
                workplace.close()


@dataclass(frozen=True, kw_only=True)
class Launcher(Part, ABC):
    """Runs jobs with an existing engine; `program` is what takes the words of `sabrage train ...`.

    `inline` is a program that takes jobs one after another, as `Kept` hands them over, in place of a process
    for each: it keeps what the next one would build again. Empty: a process for each.
    Done runs need no checkpoints to be compared, so these go unless `keep_checkpoints` says otherwise.
    """

    program: tuple[str, ...] = (sys.executable, "-m", "sabrage")
    keep_checkpoints: bool = False
    inline: tuple[str, ...] = ()

    def workplace(self, environment: dict[str, str]) -> Workplace:
        """Where jobs run one at a time; `environment` is what is added to that of this process."""
        return Kept(self.inline, environment) if self.inline else Fresh(self.program, environment)

    @abstractmethod
    def run(self, blocks: Sequence[Block], *, watch: Callable[[], None]) -> bool:
        """Runs what is not done and notes failures by job; False when stopped. `watch` is called often."""


@dataclass(frozen=True, kw_only=True)
class Local(Launcher):
    """`parallel` processes on this machine; 0 means one for each GPU, and one on a CPU.

    More processes than GPUs share them and take turns to train (`sabrage.run.turn`); those of one GPU share
    its block as well. On a CPU they share the cores: their losses hold, their timings do not.
    """

    parallel: int = 0

    def run(self, blocks: Sequence[Block], *, watch: Callable[[], None]) -> bool:
        return run_blocks(blocks, launcher=self, places=self.places(), watch=watch)

    def places(self) -> list[dict[str, str]]:
        """The environment that each process gets: its GPU, where there are several, and its turns."""
        num_gpus = torch.cuda.device_count()
        if num_gpus == 0:
            return [{} for _ in range(self.parallel or 1)]
        visible = os.environ.get(GPU)
        names = visible.split(",") if visible else [str(index) for index in range(num_gpus)]
        count = self.parallel or num_gpus
        places: list[dict[str, str]] = [{} for _ in range(count)]
        for index, place in enumerate(places):
            name = names[index % num_gpus]
            if num_gpus > 1:
                place[GPU] = name
            if count > num_gpus:
                place[TURN] = str(turn_file(name))
        return places


@dataclass(frozen=True, kw_only=True)
class OnRay(Launcher):
    """A block is a Ray task: one GPU each where the cluster has any, else one CPU.

    `address` is Ray's: "local" starts a cluster of this machine, "auto" joins the one that runs. Other
    machines need Sabrage and the data at the same paths; small files of their runs are brought back.
    """

    address: str = "local"

    def run(self, blocks: Sequence[Block], *, watch: Callable[[], None]) -> bool:
        ray = self.engine()
        blocks = [left for block in blocks if (left := [job for job in block if job.state() != "done"])]
        own = {"include_dashboard": False} if self.address == "local" else {}
        ray.init(address=self.address, log_to_driver=False, **own)
        try:
            num_gpus = min(1, ray.cluster_resources().get("GPU", 0))
            task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=0)(work)
            pending = {task.remote(block, self, Path.cwd()): block for block in blocks}
            return self.wait(ray, pending, watch)
        finally:
            ray.shutdown()

    def engine(self) -> Any:
        """The package. Raises StudyError naming the extra where it is missing."""
        try:
            import ray
        except ImportError as error:
            raise StudyError("--ray needs Ray; install it with: pip install 'sabrage[ray]'") from error
        return ray

    def wait(self, ray: Any, pending: dict[Any, Block], watch: Callable[[], None]) -> bool:
        """Takes in what comes back until nothing is left; after Ctrl-C the tasks are cancelled first."""
        cancelled = False
        with Interruption() as stop:
            while pending:
                if stop.signal is not None and not cancelled:
                    cancelled = True
                    for task in pending:
                        ray.cancel(task)
                ready, _ = ray.wait(list(pending), timeout=1.0)
                for task in ready:
                    self.take_in(ray, task, pending.pop(task), cancelled=cancelled)
                watch()
        return not cancelled

    def take_in(self, ray: Any, task: Any, block: Block, *, cancelled: bool) -> None:
        """Writes what a task brought back; a task that died fails those of its jobs that are not done."""
        try:
            files = ray.get(task)
        except ray.exceptions.RayError as error:
            for job in block:
                if job.state() != "done" and not cancelled:
                    job.fail("the Ray task ended", str(error).splitlines()[-LAST_LINES:])
            return
        for path, data in files.items():
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def work(block: Block, launcher: Launcher, cwd: Path) -> dict[Path, bytes]:
    """A block on whatever machine this is; returns the files of its runs, without the checkpoints."""
    os.chdir(cwd)
    run_blocks([block], launcher=launcher, places=[{}], watch=lambda: None)
    files = [path for job in block for path in (job.output, job.failure, *job.folder.glob("*.*"))]
    return {path: path.read_bytes() for path in files if path.is_file()}
