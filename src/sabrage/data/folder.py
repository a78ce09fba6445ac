"""A folder of `.bin` shards as a data source: FineWeb's, or one's own."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sabrage.data.shards import HEADER_BYTES, MAX_VOCABULARY, find_shards, open_shards
from sabrage.data.stream import BASELINE_BLOCK_TOKENS, ShardStream
from sabrage.data.tokenizer import GPT2Tokenizer, folder_tokenizer
from sabrage.parts import Corpus, DataError, DataSource

EDGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ShardFolder(DataSource):
    """`*train*.bin` and `*val*.bin` of a folder, in the order of their names.

    `num_shards` takes the first training shards only (0: all). `track` "auto" files results under "nocap"
    when every file is named fineweb_*, else under "own". The last token id is taken for the end of text, as
    GPT-2 and bytes have it.
    """

    path: str
    vocab_size: int = GPT2Tokenizer.vocab_size
    block_tokens: int = BASELINE_BLOCK_TOKENS
    track: str = "auto"
    num_shards: int = 0

    def problems(self) -> list[str]:
        found = []
        if not 2 <= self.vocab_size <= MAX_VOCABULARY:
            found.append(
                f"data.vocab_size={self.vocab_size}, allowed: 2 to {MAX_VOCABULARY}; GPT-2 has 50257"
            )
        if self.block_tokens < 1:
            found.append(f"data.block_tokens={self.block_tokens}, allowed: 1 or more; the baseline has 16384")
        if self.num_shards < 0:
            found.append(f"data.num_shards={self.num_shards}, allowed: 0 (all) or more; use 0")
        return found

    def open(self, folder: Path | None = None) -> Corpus:
        """Opens `folder`, or without one `path`; every token of every shard is checked. Raises DataError."""
        folder = Path(self.path).expanduser() if folder is None else folder
        trains, validations = find_shards(folder)
        if self.num_shards > len(trains):
            raise DataError(
                f"{folder}: {len(trains)} training shards, data.num_shards asks for {self.num_shards}; fetch "
                "more with `sabrage data fineweb --shards N`, or use 0 for all there are"
            )
        trains = trains[: self.num_shards] if self.num_shards else trains
        shards = open_shards([*trains, *validations], vocab_size=self.vocab_size)
        validation, end_of_text = shards[len(trains) :], self.vocab_size - 1
        if self.separates and not (shards[0] == end_of_text).any():
            raise DataError(
                f"{trains[0]}: holds no end of text (token {end_of_text}), so its documents cannot be told "
                "apart; use data.order=stream, or encode the text again with `sabrage data text`"
            )
        is_gpt2 = self.vocab_size == GPT2Tokenizer.vocab_size
        return Corpus(
            track=resolve_track(self.track, [*trains, *validations]),
            train=ShardStream(shards[: len(trains)], block_tokens=self.block_tokens, source=str(folder)),
            validation=validation[0] if len(validation) == 1 else np.concatenate(validation),
            vocab_size=self.vocab_size,
            tokenizer=folder_tokenizer(folder) if is_gpt2 else None,
            fingerprint={
                "train": [describe_shard(path) for path in trains],
                "validation": [describe_shard(path) for path in validations],
            },
            end_of_text=end_of_text,
        )


def resolve_track(track: str, paths: list[Path]) -> str:
    """The track's name, with "auto" decided by the names of the files."""
    if track != "auto":
        return track
    return "nocap" if all(path.name.startswith("fineweb_") for path in paths) else "own"


def describe_shard(path: Path) -> dict[str, Any]:
    """Name, number of tokens, and sha256 of the header and of the first and the last MiB of tokens."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES + EDGE_BYTES))
        file.seek(max(HEADER_BYTES, size - EDGE_BYTES))
        digest.update(file.read())
    return {"file": path.name, "tokens": (size - HEADER_BYTES) // 2, "sha256_of_edges": digest.hexdigest()}
