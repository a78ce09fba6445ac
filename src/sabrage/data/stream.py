"""The order of the data: shards cut into blocks, blocks into rows, rows dealt to steps and ranks.

A shard of n tokens holds floor((n - 1) / block_tokens) blocks; block b has the inputs
tokens[b * block_tokens : (b + 1) * block_tokens] and as targets the same stretch one token further on.
What is left of a shard is dropped, and after the last shard the first begins again. With blocks of one
micro-batch (16 rows of 1,024) this is the order of the NoCap baseline, token for token.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sabrage.data.packing import numbered, packed
from sabrage.parts import DataError, Order, TokenStream

BASELINE_BLOCK_TOKENS = 16 * 1024
QUEUE_STEPS = 4

Shape = tuple[int, int]
Shapes = Sequence[Shape] | Callable[[int], Shape]


class ShardStream:
    """The `TokenStream` over shards, each (N,) uint16, in the given order; `source` names them in errors."""

    def __init__(
        self, shards: Sequence[np.ndarray], *, block_tokens: int = BASELINE_BLOCK_TOKENS, source: str = "data"
    ) -> None:
        if block_tokens < 1:
            raise ValueError(f"got block_tokens={block_tokens}, allowed: 1 or more; use a power of two")
        self.shards = list(shards)
        self.block_tokens = block_tokens
        blocks = [max(0, (len(shard) - 1) // block_tokens) for shard in self.shards]
        self._ends = np.cumsum(blocks)
        self.blocks_per_epoch = sum(blocks)
        if not self.blocks_per_epoch:
            longest = max((len(shard) for shard in self.shards), default=0)
            raise DataError(
                f"{source}: the longest of {len(self.shards)} training shards has {longest:,} tokens, one "
                f"block takes {block_tokens + 1:,}; add text or use a smaller data.block_tokens"
            )

    def rows(self, first_block: int, num_blocks: int, sequence_length: int) -> np.ndarray:
        """(num_blocks * block_tokens / T, T + 1) uint16: inputs and, one further on, targets.

        Blocks are numbered over all epochs, so any step of any run is found by one integer. Raises
        ValueError when the sequence length T does not divide a block.
        """
        if sequence_length < 1 or self.block_tokens % sequence_length:
            raise ValueError(
                f"sequence_length={sequence_length} does not divide block_tokens={self.block_tokens}; use a "
                "divisor of it, or set data.block_tokens to a multiple of every sequence length"
            )
        if first_block < 0 or num_blocks < 0:
            raise ValueError(f"got first_block={first_block}, num_blocks={num_blocks}, allowed: 0 or more")
        rows = np.empty((num_blocks * self.block_tokens // sequence_length, sequence_length + 1), np.uint16)
        done = 0
        for tokens in self._runs(first_block, num_blocks):
            cut = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
            rows[done : done + len(cut)] = cut
            done += len(cut)
        return rows

    def _runs(self, first_block: int, num_blocks: int) -> Iterator[np.ndarray]:
        """Stretches of consecutive blocks of one shard, each with its one overlapping last token."""
        while num_blocks:
            block = first_block % self.blocks_per_epoch
            index = int(np.searchsorted(self._ends, block, side="right"))
            taken = min(num_blocks, int(self._ends[index]) - block)
            local = block - (int(self._ends[index - 1]) if index else 0)
            yield self.shards[index][local * self.block_tokens : (local + taken) * self.block_tokens + 1]
            first_block += taken
            num_blocks -= taken


@dataclass(frozen=True)
class Sufficiency:
    """Whether the data lasts: tokens of one epoch, tokens that the run wants, and their ratio."""

    available: int
    needed: int

    @property
    def epochs(self) -> float:
        """Passes over the data; above 1 tokens are repeated."""
        return self.needed / self.available

    @property
    def suffices(self) -> bool:
        """No token is trained on twice."""
        return self.needed <= self.available


def sufficiency(stream: TokenStream, total_tokens: int) -> Sufficiency:
    """How the stream compares with the target tokens of a whole run, known before it starts."""
    return Sufficiency(available=stream.blocks_per_epoch * stream.block_tokens, needed=total_tokens)


def blocks_of(tokens_per_step: int, block_tokens: int) -> int:
    """Blocks in one step. Raises ValueError where a step is not made of whole blocks."""
    if tokens_per_step < 1 or tokens_per_step % block_tokens:
        lower = max(tokens_per_step // block_tokens, 1) * block_tokens
        raise ValueError(
            f"tokens_per_step={tokens_per_step} is not a multiple of block_tokens={block_tokens}; use "
            f"{lower} or {lower + block_tokens}, or a data.block_tokens that divides it"
        )
    return tokens_per_step // block_tokens


class Loader:
    """Steps of token tensors for one rank, read ahead on one thread.

    `shapes` gives (sequence_length, tokens_per_step) by step: a sequence ends the iteration at its end, a
    function is asked for ever. A step yields (tokens_BT, targets_BT), int64, on `device`, and in every
    `order` but "stream" documents_BT, int32, as data/packing.py says; each document begins with
    `end_of_text`. Rank r of W gets the r-th of W equal runs of the step's rows. `next_block`, the global
    index of the first block of the step to come, is the whole state: with `next_step` it resumes the same
    stream. Without `start_block` it follows from the shapes of the steps before `start_step`.

    Raises ValueError, on the step that it concerns, for a shape that cannot be cut.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        shapes: Shapes,
        device: torch.device | str = "cpu",
        start_step: int = 0,
        start_block: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        order: Order = "stream",
        end_of_text: int | None = None,
    ) -> None:
        assert order == "stream" or end_of_text is not None, "documents begin with an end of text"
        self.order, self.end_of_text = order, end_of_text
        if not 0 <= rank < world_size:
            raise ValueError(f"got rank={rank}, allowed: 0 to {world_size - 1} for world_size={world_size}")
        self.stream, self.rank, self.world_size = stream, rank, world_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._shape = shapes if callable(shapes) else shapes.__getitem__
        self._end = None if callable(shapes) else len(shapes)
        if start_block is None:
            start_block = sum(self._num_blocks(step) for step in range(start_step))
        self.next_step, self.next_block = start_step, start_block
        self._ready: queue.SimpleQueue[tuple[list[Tensor], int] | Exception] = queue.SimpleQueue()
        self._free = threading.Semaphore(QUEUE_STEPS)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(start_step, start_block), name="sabrage-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        if self._closed.is_set():
            raise ValueError("the loader was closed; make a new one with start_step and start_block")
        item = self._ready.get()
        self._free.release()
        if not isinstance(item, tuple):
            # An end stays an end, an error an error, however often the consumer asks.
            self._ready.put(item)
            raise item
        tensors, num_blocks = item
        self.next_step += 1
        self.next_block += num_blocks
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def close(self) -> None:
        """Stops the thread, whatever it waits for, and returns when it has ended."""
        self._closed.set()
        self._free.release()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _num_blocks(self, step: int) -> int:
        return blocks_of(self._shape(step)[1], self.stream.block_tokens)

    def _read_ahead(self, step: int, block: int) -> None:
        try:
            if self.device.type == "cuda":
                # Pinning allocates in the thread's current device, which else is 0 on every rank.
                torch.cuda.set_device(self.device)
            for number in itertools.count(step) if self._end is None else range(step, self._end):
                self._free.acquire()
                if self._closed.is_set():
                    return
                num_blocks = self._num_blocks(number)
                self._ready.put((self._read(number, block, num_blocks), num_blocks))
                block += num_blocks
            self._ready.put(StopIteration())
        except Exception as error:
            # Whatever goes wrong belongs to the consumer, who raises it.
            self._ready.put(error)

    def _rows(self, block: int, num_blocks: int, sequence_length: int) -> tuple[np.ndarray, ...]:
        """Inputs, targets and, unless the order is the stream's, documents of a step, each (rows, T)."""
        if self.order == "documents":
            blocks_NS = self.stream.rows(block, num_blocks, self.stream.block_tokens)
            return packed(blocks_NS, sequence_length, self.end_of_text)
        rows = self.stream.rows(block, num_blocks, sequence_length)
        pair = rows[:, :-1], rows[:, 1:]
        return pair if self.order == "stream" else (*pair, numbered(rows[:, :-1], self.end_of_text))

    def _read(self, step: int, block: int, num_blocks: int) -> list[Tensor]:
        """This rank's share of one step on the host, (B, T) each."""
        sequence_length = self._shape(step)[0]
        inputs, *others = self._rows(block, num_blocks, sequence_length)
        if len(inputs) % self.world_size:
            raise ValueError(
                f"step {step}: {len(inputs)} rows of {sequence_length} tokens cannot be shared by "
                f"{self.world_size} ranks; use a tokens_per_step that is a multiple of "
                f"{sequence_length * self.world_size}"
            )
        share = len(inputs) // self.world_size
        mine, pinned = slice(self.rank * share, (self.rank + 1) * share), self.device.type == "cuda"
        tensors = []
        for array, dtype in zip((inputs, *others), (torch.int64, torch.int64, torch.int32), strict=False):
            tensors.append(torch.empty((share, sequence_length), dtype=dtype, pin_memory=pinned))
            tensors[-1].numpy()[:] = array[mine]
        return tensors
