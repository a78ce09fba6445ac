"""One's own text to shards: .txt, .jsonl and .parquet files, tokenised by several processes.

Every document gets an end of text before it. It goes to validation when its hash, as a fraction of the
largest hash, lies below `validation_fraction`: a document lands on the same side in every run.
"""

import hashlib
import math
import multiprocessing
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.progress import Progress

from sabrage.data.documents import find_files, read_documents
from sabrage.data.shards import ShardWriter
from sabrage.data.tokenizer import RANKS_NAME, GPT2Tokenizer
from sabrage.parts import DataError, Tokenizer

SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1 << 20

Document = tuple[str, bool]


@dataclass(frozen=True)
class EncodedText:
    """What was written: shards in order, documents read, tokens of each split (end of text counted)."""

    shards: tuple[Path, ...]
    documents: int
    train_tokens: int
    validation_tokens: int


def encode_text(
    paths: Iterable[Path],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    field: str = "text",
    validation_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    num_workers: int | None = None,
    console: Console | None = None,
) -> EncodedText:
    """Writes train_000000.bin, ... and val_000000.bin, ... of the documents in `paths` into `folder`.

    All input is read once before anything is written, so that a bad line stops at once and both splits get
    a document; the shards appear together at the end. A rank file of the tokenizer is copied along. Raises
    DataError for input that cannot be read, ValueError for numbers out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"got validation_fraction={validation_fraction}, allowed: 0 to below 1; 0.01 is usual"
        )
    if shard_tokens < 1:
        raise ValueError(f"got shard_tokens={shard_tokens}, allowed: 1 or more; {SHARD_TOKENS} is usual")
    files = find_files(paths)
    if list(folder.glob("*.bin")):
        raise DataError(f"{folder}: already holds .bin files; choose a new folder with --out, or delete them")
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever is wrong with the tokenizer shows here and not in a worker.
    tokenizer.encode("")
    with Progress(console=console) as progress:
        tracked = progress.track(files, description="reading")
        survey = Survey.of(read_documents(tracked, field))
        documents = survey.split(read_documents(files, field), validation_fraction)
        task = progress.add_task("encoding", total=survey.documents)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".encoding-") as staging,
            SplitWriter(Path(staging), "train", shard_tokens) as train,
            SplitWriter(Path(staging), "val", shard_tokens) as validation,
        ):
            for batch in encode_batches(batches_of(documents), tokenizer, num_workers or os.cpu_count() or 1):
                train.write(batch.train)
                validation.write(batch.validation)
                progress.advance(task, batch.documents)
            written = [*train.finish(), *validation.finish()]
            if isinstance(tokenizer, GPT2Tokenizer) and tokenizer.ranks is not None:
                shutil.copyfile(tokenizer.ranks, folder / RANKS_NAME)
            shards = tuple(path.replace(folder / path.name) for path in written)
    return EncodedText(shards, survey.documents, train.num_tokens, validation.num_tokens)


@dataclass(frozen=True)
class Survey:
    """What a first reading found: the number of documents, the lowest and the highest of their hashes."""

    documents: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, documents: Iterable[str]) -> Self:
        """Reads them all. Raises DataError when there is none."""
        count, lowest, highest = 0, math.inf, -math.inf
        for text in documents:
            place = hash_of(text)
            count, lowest, highest = count + 1, min(lowest, place), max(highest, place)
        if not count:
            raise DataError("the input holds no text: every document is empty; name files with text in them")
        return cls(count, lowest, highest)

    def split(self, documents: Iterable[str], validation_fraction: float) -> Iterator[Document]:
        """(text, is validation); both splits get one unless the fraction is 0.

        A document that is alone is itself cut, near the end of a line: its tail is the validation text.
        """
        for text in documents:
            if not validation_fraction:
                yield text, False
            elif self.lowest == self.highest:
                place = max(1, int(len(text) * (1 - validation_fraction)))
                place = text.rfind("\n", 1, place) + 1 or place
                yield text[:place], False
                yield text[place:], True
            else:
                limit = min(max(validation_fraction, math.nextafter(self.lowest, 1)), self.highest)
                yield text, hash_of(text) < limit


def hash_of(text: str) -> float:
    """A number from 0 to 1 that depends on nothing but the text."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens of some documents, (N,) uint16 for each split."""

    documents: int
    train: np.ndarray
    validation: np.ndarray


def batches_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of about a million characters together."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(batch: list[Document], tokenizer: Tokenizer) -> EncodedBatch:
    """Runs in a worker."""
    splits: dict[bool, list[int]] = {False: [], True: []}
    for text, is_validation in batch:
        splits[is_validation].append(tokenizer.end_of_text)
        splits[is_validation].extend(tokenizer.encode(text))
    train, validation = (np.array(splits[kind], dtype=np.uint16) for kind in (False, True))
    return EncodedBatch(len(batch), train, validation)


def encode_batches(
    batches: Iterable[list[Document]], tokenizer: Tokenizer, num_workers: int
) -> Iterator[EncodedBatch]:
    """The encoded batches in order; only a few wait in memory, however much text there is."""
    if num_workers == 1:
        yield from (encode_batch(batch, tokenizer) for batch in batches)
        return
    waiting: deque[Future[EncodedBatch]] = deque()
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for batch in batches:
            waiting.append(pool.submit(encode_batch, batch, tokenizer))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class SplitWriter:
    """The shards of one split, each of exactly `shard_tokens` tokens but for the last."""

    def __init__(self, folder: Path, kind: str, shard_tokens: int) -> None:
        self.folder, self.kind, self.shard_tokens = folder, kind, shard_tokens
        self.num_tokens = 0
        self.paths: list[Path] = []
        self._shard: ShardWriter | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Appends (N,) tokens, over as many shards as they take."""
        self.num_tokens += tokens.size
        while tokens.size:
            if self._shard is None:
                self._shard = ShardWriter(self.folder / f"{self.kind}_{len(self.paths):06d}.bin")
            room = self.shard_tokens - self._shard.num_tokens
            self._shard.write(tokens[:room])
            tokens = tokens[room:]
            if self._shard.num_tokens == self.shard_tokens:
                self.finish()

    def finish(self) -> list[Path]:
        """Completes the shard in work and returns the paths of all."""
        if self._shard is not None:
            self._shard.close()
            self.paths.append(self._shard.path)
            self._shard = None
        return self.paths

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.discard()
