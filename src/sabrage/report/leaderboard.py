"""Who is how fast: runs side by side, with the three clocks and the cost in steps of the baseline.

cost = train_seconds / median seconds of a step of the baseline on the same track and device. The baseline
takes 4,768 of its own steps to the official target, so there speed-up = 4,768 / cost.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from sabrage.report.difference import Difference, differences
from sabrage.report.history import standing
from sabrage.run.folder import Run
from sabrage.run.units import count, duration, size

OFFICIAL_TRACK, OFFICIAL_TARGET = "nocap", 3.3821
# What makes a run one of the baseline, and how many steps the baseline takes to the official target.
BASELINES, BASELINE_PARAMETERS, BASELINE_TOKENS_PER_STEP = ("nocap", "nocap-mini"), 123_532_032, 524_288
BASELINE_STEPS = 4768
SHOWN_IN_LABEL = 2


@dataclass(frozen=True)
class Variant:
    """A recipe, whatever its seed: `changes` are its differences from the group's first one."""

    label: str
    colour: int
    recipe: dict[str, Any]
    changes: tuple[Difference, ...]


@dataclass(frozen=True)
class Entry:
    """A run in a group: `key` is its name within the page's script, `facts` how far it is."""

    run: Run
    key: str
    variant: Variant
    facts: dict[str, Any]

    @property
    def loss(self) -> float:
        """The last validation loss; infinite without one, so that it sorts last."""
        loss = self.facts.get("validation_loss")
        return math.inf if loss is None or math.isnan(float(loss)) else float(loss)

    @property
    def ending(self) -> str:
        """How it ended."""
        return self.facts.get("ending", "not ended")

    @property
    def legality(self) -> dict[str, Any] | None:
        """The verdict on the model, {"passed", "checks"}; None where nobody asked."""
        return self.run.manifest.get("legality")

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of a step, once the run has ended."""
        return self.facts.get("median_step_seconds")

    @property
    def is_baseline(self) -> bool:
        """Whether its steps are those of the baseline, 524,288 tokens through 124M parameters."""
        manifest = self.run.manifest
        named = manifest["recipe"]["name"] in BASELINES and manifest.get("parameters") == BASELINE_PARAMETERS
        return named and manifest["recipe"]["plan"]["tokens_per_step"] == BASELINE_TOKENS_PER_STEP


@dataclass(frozen=True)
class Group:
    """Runs whose numbers compare: of one track, on one kind of device and as many of them."""

    track: str
    device: str
    variants: Sequence[Variant]
    entries: Sequence[Entry]

    @property
    def target(self) -> float | None:
        """The loss to meet, in nats: the track's, or the one that all recipes name."""
        if self.track == OFFICIAL_TRACK:
            return OFFICIAL_TARGET
        targets = {entry.run.manifest["recipe"].get("budget", {}).get("target") for entry in self.entries}
        return targets.pop() if len(targets) == 1 else None

    def meets(self, entry: Entry) -> bool:
        """Whether the run ended at or below the target."""
        return self.target is not None and entry.run.result is not None and entry.loss <= self.target

    @property
    def baseline_step(self) -> float | None:
        """Seconds of a step of the baseline, the median of its runs here; None without any."""
        known = [entry.step_seconds for entry in self.entries if entry.is_baseline]
        return median(seconds for seconds in known if seconds) if any(known) else None

    def ranked(self) -> list[Entry]:
        """Those that meet the target by train seconds, then the others by loss."""

        def rank(entry: Entry) -> tuple[bool, float]:
            met = self.meets(entry)
            return not met, entry.facts["train_seconds"] if met else entry.loss

        return sorted(self.entries, key=rank)


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by track and device, each in the order given; the first recipe of a group is its reference."""
    kinds: dict[tuple[str, str], list[tuple[str, Run]]] = {}
    for index, run in enumerate(runs):
        processes = run.manifest.get("processes", 1)
        device = ("" if processes == 1 else f"{processes} x ") + run.manifest["device"]["name"]
        kinds.setdefault((run.manifest["track"], device), []).append((f"r{index}", run))
    return [_group(track, device, named) for (track, device), named in kinds.items()]


def _group(track: str, device: str, named: Sequence[tuple[str, Run]]) -> Group:
    # The baseline, where it is there, is what the others are told apart from.
    recipes = [run.manifest["recipe"] for _, run in named]
    reference = next((recipe for recipe in recipes if recipe["name"] in BASELINES), recipes[0])
    kinds: dict[tuple[Difference, ...], list[tuple[str, Run]]] = {(): []}
    for key, run in named:
        kinds.setdefault(tuple(differences(reference, run.manifest["recipe"])), []).append((key, run))
    names = Counter(same[0][1].manifest["recipe"]["name"] for same in kinds.values())
    variants: list[Variant] = []
    entries: dict[str, Entry] = {}
    for colour, (changes, same) in enumerate(kinds.items()):
        label = _label([run for _, run in same], changes, names)
        variants.append(Variant(label, colour, same[0][1].manifest["recipe"], changes))
        entries |= {key: Entry(run, key, variants[-1], standing(run)) for key, run in same}
    return Group(track, device, variants, [entries[key] for key, _ in named])


def _label(runs: Sequence[Run], changes: Sequence[Difference], names: Counter[str]) -> str:
    """The recipe's name; where others share it, a study's name for it, or what first tells it apart."""
    name = runs[0].manifest["recipe"]["name"]
    given = {run.path.name.rpartition("--seed-")[0] for run in runs}
    if names[name] == 1:
        return name
    if len(given) == 1 and (only := given.pop()):
        return only
    fields = [f"{one.path.rpartition('.')[2]}={one.after[:24]}" for one in changes[:SHOWN_IN_LABEL]]
    fields += ["..."] if len(changes) > SHOWN_IN_LABEL else []
    return " · ".join([name, ", ".join(fields)]) if fields else name


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard; `why` is what its title explains."""

    key: str
    title: str
    why: str
    tell: Callable[[Any], str] = str


COLUMNS = (
    Column("seed", "seed", "Seed of the initial weights"),
    Column("validation_loss", "loss", "Last validation loss, nats per token", "{:.4f}".format),
    Column("train_seconds", "train", "Training steps only", duration),
    Column("nocap_seconds", "nocap", "Since step 0, compile included, validation left out", duration),
    Column("wall_seconds", "wall", "Since the process started, everything", duration),
    Column("cost", "baseline steps", "Train time over that of one step of the baseline", "{:,.1f}".format),
    Column("speedup", "speed-up", "Over the baseline, once the official target is met", "{:.2f}x".format),
    Column("steps", "steps", "Updates done", "{:,}".format),
    Column("tokens", "tokens", "Tokens trained on", count),
    Column("tokens_per_second", "tokens/s", "Tokens per second of training", count),
    Column("mfu", "MFU", "Model FLOPs over the device's peak matrix rate", "{:.1%}".format),
    Column("peak_memory", "memory", "Most that was allocated on the device", size),
    Column("ending", "ending", "How the run ended"),
)


def leaderboard(group: Group) -> tuple[list[Column], list[tuple[Entry, dict[str, tuple[Any, str]]]]]:
    """The columns that say anything, and for every ranked run (value, text) by column."""
    rows = [(entry, values(group, entry)) for entry in group.ranked()]
    always = ("cost", "speedup") if group.track == OFFICIAL_TRACK else ("cost",)
    columns = [
        column
        for column in COLUMNS
        if column.key in always or any(found[column.key] is not None for _, found in rows)
    ]
    told = []
    for entry, found in rows:
        known = [(column, found[column.key]) for column in columns]
        texts = {one.key: (value, "-" if value is None else one.tell(value)) for one, value in known}
        told.append((entry, texts))
    return columns, told


def values(group: Group, entry: Entry) -> dict[str, Any]:
    """What the leaderboard says of a run, None where it cannot be known."""
    facts = {column.key: entry.facts.get(column.key) for column in COLUMNS}
    step, seconds = group.baseline_step, facts["train_seconds"]
    cost = seconds / step if step and seconds else None
    proven = group.track == OFFICIAL_TRACK and group.meets(entry) and cost
    return facts | {
        "seed": entry.run.manifest["seed"],
        "validation_loss": None if math.isinf(entry.loss) else entry.loss,
        "ending": entry.ending,
        "cost": cost,
        "speedup": BASELINE_STEPS / cost if proven and cost else None,
    }


def remarks(group: Group) -> Iterator[str]:
    """Sentences on how the leaderboard is to be read."""
    official = group.track == OFFICIAL_TRACK
    if group.target is not None:
        yield f"Runs that meet the target of {group.target} nats come first, by train time; then by loss."
    if group.baseline_step:
        yield f"One step of the baseline took {group.baseline_step:.4f} s here."
        if official:
            yield f"Speed-up is {BASELINE_STEPS:,}, the steps of the baseline to the target, over the cost."
    else:
        yield (
            "The cost in baseline steps is not known: among these is no ended run of the baseline "
            f"({BASELINES[0]}) on this track and device."
        )
    if not official:
        yield f"The track is {group.track}, not the official one: losses of different tracks do not compare."
    seeds = [len(list(same)) for _, same in groupby(sorted(entry.variant.colour for entry in group.entries))]
    if len(seeds) > 1 and max(seeds) == 1:
        yield "One seed each: this screens and proves nothing; `sabrage study compare` says what is noise."
