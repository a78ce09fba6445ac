"""Shards: the public `.bin` format of pre-tokenised text (llm.c, kjj0/fineweb10B-gpt2), read and written.

A shard is 256 little-endian int32 header words (magic 20240520, version 1, number of tokens, zeros) and
then the tokens as uint16: size in bytes = 1024 + 2 * tokens.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sabrage.parts import DataError

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
MAX_VOCABULARY = 1 << 16
SCAN_TOKENS = 1 << 22
REPAIR = "delete it and fetch or encode it again"


def read_header(path: Path) -> int:
    """The number of tokens of one shard, its header and its size checked. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path, or fetch data with `sabrage data fineweb`")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, a shard has at least {HEADER_BYTES}; {REPAIR}")
    magic, version, num_tokens = (int(word) for word in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(
            f"{path}: not a token shard: it begins with {magic}, a shard with {MAGIC}; "
            "encode your own text with `sabrage data text`"
        )
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, only version {VERSION} can be read; {REPAIR}")
    if num_tokens <= 0:
        raise DataError(f"{path}: holds {num_tokens} tokens; {REPAIR}")
    expected = HEADER_BYTES + num_tokens * TOKEN.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path}: {fault}: {size:,} bytes where its {num_tokens:,} tokens take {expected:,}; {REPAIR}"
        )
    return num_tokens


def open_shard(path: Path, *, vocab_size: int) -> np.ndarray:
    """The tokens of one shard, (N,) uint16, memory-mapped; every token id is checked. Raises DataError."""
    num_tokens = read_header(path)
    tokens = np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
    for start in range(0, num_tokens, SCAN_TOKENS):
        chunk = tokens[start : start + SCAN_TOKENS]
        if chunk.max() >= vocab_size:
            index = int(np.argmax(chunk >= vocab_size))
            raise DataError(
                f"{path}: token {start + index:,} is {chunk[index]}, allowed: 0 to {vocab_size - 1}; set the "
                "vocab_size of the tokenizer that made the file, or encode the text again"
            )
    return tokens


def open_shards(paths: Iterable[Path], *, vocab_size: int) -> list[np.ndarray]:
    """`open_shard` of every path, read side by side (numpy scans outside the interpreter's lock)."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: open_shard(path, vocab_size=vocab_size), paths))


def find_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """(`*train*.bin`, `*val*.bin`) of a folder, sorted by name. Raises DataError where either is missing."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; fetch FineWeb with `sabrage data fineweb --out {folder}`, or make "
            f"shards of your own text with `sabrage data text PATH --out {folder}`"
        )
    found = []
    for kind, meaning in (("train", "training"), ("val", "validation")):
        paths = sorted(folder.glob(f"*{kind}*.bin"))
        if not paths:
            raise DataError(
                f"{folder}: holds no {meaning} shard (*{kind}*.bin); fetch one with `sabrage data fineweb "
                f"--out {folder}`, or encode your own text with `sabrage data text` into a new folder"
            )
        found.append(paths)
    return found[0], found[1]


class ShardWriter:
    """Writes one shard piece by piece; the file appears under its name, whole, when `close` returns.

    As a context manager it closes on success and leaves nothing behind on an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_tokens = 0
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: np.ndarray) -> None:
        """Appends token ids, any integer type, each in 0 to 65535. Raises ValueError beyond."""
        if tokens.size and (tokens.min() < 0 or tokens.max() >= MAX_VOCABULARY):
            raise ValueError(f"got token ids {tokens.min()} to {tokens.max()}, a shard holds 0 to 65535")
        self._file.write(tokens.astype(TOKEN).tobytes())
        self.num_tokens += tokens.size

    def close(self) -> None:
        """Completes the header and gives the file its name. Raises DataError when nothing was written."""
        if not self.num_tokens:
            self.discard()
            raise DataError(
                f"{self.path}: a shard without tokens cannot be read back; write some tokens first"
            )
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.num_tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Drops what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes one whole shard of (N,) token ids, atomically."""
    with ShardWriter(path) as writer:
        writer.write(tokens)
