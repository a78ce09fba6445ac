"""Many texts at once: prompts are admitted as others finish, and each token is handed out when it is known.

A prompt is read alone, in pieces, and all rows then go on together in steps of one fixed shape: what a
request draws does not depend on its neighbours (in fp32 its logits do by rounding at most). Pages for all
that a request may need are taken at its admission, so a text that has begun can be finished.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch

from sabrage.generate.paged import PAGE_SIZE, PagedCache
from sabrage.generate.pages import CacheFull, Sequence
from sabrage.generate.sampling import Sampler, Sampling
from sabrage.generate.step import DecodeStep, next_logits
from sabrage.model.lm import LM


@dataclass(frozen=True, kw_only=True)
class Request:
    """Up to `max_tokens` new tokens after a prompt, ended early by `end_of_text`.

    With `keep` the cache holds on to the text when it ends, for requests that name it in `after` and whose
    prompts then go on from it, sharing its pages. Only a cache with pages can do so.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    end_of_text: int | None = None
    keep: bool = False
    after: int | None = None


@dataclass(frozen=True)
class Event:
    """A new token of a request, or None for the end of text; `finished` says why it was the last."""

    request: int
    token: int | None
    finished: str | None = None


@dataclass
class Running:
    """A request in a row. The newest of its tokens is not in the cache yet."""

    number: int
    request: Request
    sequence: Sequence
    newest: int
    left: int


class Engine:
    """Runs requests, `rows` at a time, each of up to `capacity` tokens with its prompt.

    `num_pages` is the size of the paged cache; None: a dense one with room for `capacity` tokens a row.
    `window` is the plan's, as in `Context`. The model's weights say where and in which format it computes.
    """

    def __init__(
        self,
        model: LM,
        *,
        rows: int,
        capacity: int,
        num_pages: int | None = None,
        window: int | None = None,
        chunk: int = 512,
    ) -> None:
        weight = next(model.parameters())
        self.model, self.device, self.window, self.chunk = model, weight.device, window, chunk
        self.capacity, self.paged = capacity, num_pages is not None
        # A dense cache has one page a row, of a length that is no page's.
        page_size = PAGE_SIZE if self.paged else max(-(-capacity // PAGE_SIZE), 2) * PAGE_SIZE
        self.cache = PagedCache(
            model.spec,
            num_pages=rows if num_pages is None else num_pages,
            page_size=page_size,
            device=self.device,
            dtype=weight.dtype,
        )
        self.idle = [Sequence() for _ in range(rows)]
        if not self.paged:
            for sequence in self.idle:
                self.cache.reserve(sequence, capacity)
        self.rows: list[Running | None] = [None] * rows
        self.waiting: deque[tuple[int, Request]] = deque()
        self.kept: dict[int, tuple[Sequence, int]] = {}
        self.numbers = count()
        self.sampler = Sampler(rows=rows, vocab_size=model.spec.vocab_size, device=self.device)
        self.view, self.single = (self.cache.view(rows=n, max_length=capacity) for n in (rows, 1))
        graphs = self.device.type == "cuda"
        self.decode = DecodeStep(model, self.view, self.sampler, graphs=graphs, window=window)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(self.rows)

    def submit(self, request: Request) -> int:
        """Queues a request; returns its number. Raises ValueError for one that can never be served."""
        if not request.prompt and request.after is None:
            raise ValueError("the prompt has no tokens; give at least one, such as end-of-text")
        if request.max_tokens < 1:
            raise ValueError(f"got max_tokens={request.max_tokens}, allowed: 1 or more")
        if (request.keep or request.after is not None) and not self.paged:
            raise ValueError("a dense cache keeps no text beyond its end; give the engine pages")
        if request.after is not None and request.after not in self.kept:
            raise ValueError(f"no text of request {request.after} is kept; submit that one with keep")
        before = len(request.prompt) + self.kept_length(request.after)
        for path, limit in (self.model.spec.max_lengths() | {"the cache's capacity": self.capacity}).items():
            # The last new token is never read.
            room = max(limit + 1 - before, 0)
            if request.max_tokens > room:
                raise ValueError(
                    f"got max_tokens={request.max_tokens}, allowed: {room} after a prompt of {before} tokens"
                    f", since {path}={limit}; ask for fewer, or shorten the prompt"
                )
        number = next(self.numbers)
        self.waiting.append((number, request))
        return number

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Reads the prompt of one waiting request, or else gives every running one its next token.

        Raises CacheFull where the next request finds too few pages and no other is left that could end.
        """
        if self.waiting and None in self.rows:
            event = self.admit(self.rows.index(None))
            if event is not None:
                return [event]
        running = {index: row for index, row in enumerate(self.rows) if row is not None}
        if not running:
            return []
        sequences = [self.idle[index] if row is None else row.sequence for index, row in enumerate(self.rows)]
        longest = max(row.sequence.length for row in running.values()) + 1
        self.view.load(sequences, [int(row is not None) for row in self.rows], width=self.width(longest))
        self.sampler.advance(running)
        tokens = self.decode().tolist()
        for row in running.values():
            row.sequence.length += 1
        return [self.note(index, tokens[index]) for index in running]

    def width(self, longest: int) -> int:
        """The entries that a step looks at: one of few numbers, since each is a graph of its own."""
        pages = -(-longest // PAGE_SIZE)
        return min(1 << (pages - 1).bit_length(), -(-self.capacity // PAGE_SIZE)) * PAGE_SIZE

    def admit(self, index: int) -> Event | None:
        """Reads the next prompt into a row; returns its first token, or None while pages are too few."""
        number, request = self.waiting[0]
        prompt, sequence = list(request.prompt), self.idle[index]
        if request.after is not None:
            kept, newest = self.kept[request.after]
            sequence, prompt = self.cache.fork(kept), [newest, *prompt]
        try:
            self.cache.reserve(sequence, len(prompt) + request.max_tokens - 1)
        except CacheFull:
            if self.paged:
                self.cache.release(sequence)
            if not any(self.rows):
                raise
            return None
        self.waiting.popleft()
        self.rows[index] = Running(number, request, sequence, prompt[-1], request.max_tokens)
        if self.paged:
            self.idle[index] = Sequence()
        rows, tokens_1T = slice(index, index + 1), torch.tensor([prompt], device=self.device)
        self.sampler.place(index, request.sampling, request.seed)
        self.sampler.see(tokens_1T, rows)
        for piece_1T in tokens_1T.split(self.chunk, dim=1):
            self.single.load([sequence], [piece_1T.shape[1]])
            logits_1V = next_logits(self.model, self.single, piece_1T, self.window)
            sequence.length += piece_1T.shape[1]
        self.sampler.advance([index])
        token = int(self.sampler(logits_1V, cut=request.sampling.cuts, rows=rows))
        self.decode.tokens_B1[index] = token
        return self.note(index, token)

    def note(self, index: int, token: int) -> Event:
        """What the new token of a row means."""
        row = self.rows[index]
        assert row is not None
        row.newest, row.left = token, row.left - 1
        ended = token == row.request.end_of_text
        finished = "end of text" if ended else None if row.left else "length"
        if finished:
            self.finish(index)
        return Event(row.number, None if ended else token, finished)

    def finish(self, index: int) -> None:
        """Empties a row."""
        row = self.rows[index]
        assert row is not None
        self.rows[index] = None
        self.sampler.clear(index)
        if row.request.keep:
            self.cache.trim(row.sequence)
            self.kept[row.number] = (row.sequence, row.newest)
        elif self.paged:
            self.cache.release(row.sequence)
        else:
            row.sequence.length = 0

    def kept_length(self, number: int | None) -> int:
        """Tokens of the kept text of a request; 0 for None."""
        return 0 if number is None else self.kept[number][0].length + 1

    def cancel(self, number: int) -> None:
        """Ends a request that waits or runs; one that has ended already is left alone."""
        self.waiting = deque(item for item in self.waiting if item[0] != number)
        for index, row in enumerate(self.rows):
            if row is not None and row.number == number:
                self.finish(index)

    def forget(self, number: int) -> None:
        """Gives the pages of a kept text back, but for those that others share."""
        self.cache.release(self.kept.pop(number)[0])

    def run(self) -> Iterator[Event]:
        """All events until nothing waits or runs."""
        while self.busy:
            yield from self.step()
