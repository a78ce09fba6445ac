"""What is in a shard or a folder of shards: tokens, documents, their lengths, and a piece of the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sabrage.data.shards import MAX_VOCABULARY, open_shards
from sabrage.parts import DataError, Tokenizer

BAR_WIDTH = 40


@dataclass(frozen=True)
class ShardFacts:
    """One shard: its name, tokens, and documents that begin in it."""

    name: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class Inspection:
    """`lengths[i]` counts the documents of 2^i to 2^(i+1) - 1 tokens, the end of text counted."""

    source: str
    shards: tuple[ShardFacts, ...]
    lengths: tuple[int, ...]
    sample: str

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)


def inspect_shards(path: Path, *, tokenizer: Tokenizer, num_sample_tokens: int = 200) -> Inspection:
    """Reads a `.bin` file, or every `.bin` file of a folder. Raises DataError naming what is wrong.

    Where the tokenizer cannot be had, the sample says why.
    """
    paths = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not paths:
        raise DataError(
            f"{path}: holds no .bin file; make some with `sabrage data fineweb` or `sabrage data text`"
        )
    shards = open_shards(paths, vocab_size=min(tokenizer.vocab_size, MAX_VOCABULARY))
    starts = [np.flatnonzero(shard == tokenizer.end_of_text) for shard in shards]
    facts = tuple(
        ShardFacts(path.name, len(shard), len(places))
        for path, shard, places in zip(paths, shards, starts, strict=True)
    )
    try:
        sample = tokenizer.decode(shards[0][:num_sample_tokens].tolist())
    except DataError as error:
        sample = f"(no sample: {error})"
    return Inspection(str(path), facts, count_lengths(shards, starts), sample)


def count_lengths(shards: Sequence[np.ndarray], starts: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Documents by the power of two of their length; one that goes on in the next shard is cut there."""
    lengths = [np.diff(places, append=len(shard)) for shard, places in zip(shards, starts, strict=True)]
    powers = np.log2(np.concatenate(lengths)).astype(np.int64)
    return tuple(np.bincount(powers).tolist())


def render(inspection: Inspection) -> RenderableType:
    """Tables and bars for the terminal."""
    shards = Table(title=inspection.source)
    shards.add_column("shard")
    shards.add_column("tokens", justify="right")
    shards.add_column("documents", justify="right")
    for shard in inspection.shards:
        shards.add_row(shard.name, f"{shard.tokens:,}", f"{shard.documents:,}")
    shards.add_section()
    shards.add_row("all", f"{inspection.tokens:,}", f"{inspection.documents:,}")
    bars = Table(title="document lengths", box=None)
    bars.add_column("tokens", justify="right")
    bars.add_column("documents", justify="right")
    bars.add_column("")
    highest = max(inspection.lengths, default=1)
    for power, count in enumerate(inspection.lengths):
        if count:
            bar = "█" * max(1, round(BAR_WIDTH * count / highest))
            bars.add_row(f"{2**power:,} to {2 ** (power + 1) - 1:,}", f"{count:,}", bar)
    return Group(shards, bars, Panel(Text(inspection.sample), title="beginning of the first shard"))
