"""The paged cache: sequences of different lengths in pages of one pool (Kwon et al. 2023, arXiv 2309.06180).

Every declared stream of every layer has a pool of pages, all numbered alike, so that one table a sequence
serves them. Entry s of a sequence lies in its page s // S at place s % S. Sequences share the pages of a
common beginning; a shared page that is to be written to is copied first. With pages as long as the longest
sequence it is a dense cache for sequences of different lengths, and then nothing is ever gathered.
"""

from collections.abc import Sequence as Listed

import torch
from torch import Tensor

from sabrage.context import Pages
from sabrage.generate.cache import streams_of, upload
from sabrage.generate.pages import PageAllocator, Sequence
from sabrage.model.lm import ModelSpec

PAGE_SIZE = 64


class PagedCache:
    """Storage and bookkeeping; a pass over some of its sequences goes through a `PagedView`."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.page_size, self.device = page_size, torch.device(device)
        self.allocator = PageAllocator(num_pages)
        # Zeros, since a weight of 0 does not undo what is no number.
        self.layers: list[dict[str, Tensor]] = [
            {
                name: torch.zeros(num_pages + 1, page_size, width, device=device, dtype=dtype)
                for name, width in streams_of(spec, layer).items()
            }
            for layer in range(spec.layers)
        ]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens fill or begin."""
        return -(-num_tokens // self.page_size)

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes sure that the sequence has pages of its own for so many more tokens.

        To be called before the pass that writes them. Raises CacheFull, nothing changed.
        """
        held, end = len(sequence.pages), self.pages_for(sequence.length + num_tokens)
        first, holders = sequence.length // self.page_size, self.allocator.holders
        shared = [index for index in range(first, min(end, held)) if holders[sequence.pages[index]] > 1]
        taken = self.allocator.take(max(end - held, 0) + len(shared))
        for index in shared:
            old, new = sequence.pages[index], taken.pop()
            for stored in self.layers:
                for pages_PSX in stored.values():
                    pages_PSX[new] = pages_PSX[old]
            sequence.pages[index] = new
            self.allocator.drop([old])
        sequence.pages += taken

    def fork(self, sequence: Sequence) -> Sequence:
        """Another sequence with the same entries, which both now share."""
        used = sequence.pages[: self.pages_for(sequence.length)]
        return Sequence(self.allocator.share(used), sequence.length)

    def trim(self, sequence: Sequence) -> None:
        """Gives back the pages of a sequence that hold nothing yet."""
        used = self.pages_for(sequence.length)
        self.allocator.drop(sequence.pages[used:])
        del sequence.pages[used:]

    def release(self, sequence: Sequence) -> None:
        """Forgets the sequence, which is empty afterwards."""
        self.allocator.drop(sequence.pages)
        sequence.pages, sequence.length = [], 0

    def view(self, *, rows: int, max_length: int) -> "PagedView":
        """Room for passes over `rows` sequences of up to `max_length` tokens."""
        return PagedView(self, rows=rows, columns=self.pages_for(max_length))

    def page_bytes(self) -> int:
        """Memory of one page, all layers and streams together."""
        return sum(
            pages[0].numel() * pages.element_size() for stored in self.layers for pages in stored.values()
        )

    def bytes(self) -> int:
        """Memory held."""
        return (self.allocator.num_pages + 1) * self.page_bytes()


class PagedView:
    """The `Cache` of one pass over up to `rows` sequences, which may be of different lengths.

    A pass is `load`, `begin`, the model, and last the caller's adding to each sequence's length. Everything
    that changes from pass to pass lies in tensors that stay where they are, so that a CUDA graph of `begin`
    and the model serves all passes of one `width`.
    """

    def __init__(self, cache: PagedCache, *, rows: int, columns: int) -> None:
        self.cache, self.width = cache, cache.page_size
        self.paged = cache.page_size == PAGE_SIZE
        # The page of the first row, where every row is one large page and they follow one another.
        self.run: int | None = None
        self.host = torch.zeros(rows * (columns + 2), dtype=torch.int32)
        self.state = self.host.to(cache.device, copy=True)
        self.starts_B, self.counts_B, table = self.state.split([rows, rows, rows * columns])
        self.table_BN = table.view(rows, columns)
        self.lengths_B = torch.zeros_like(self.starts_B)
        self.shown: list[list[int]] = [[] for _ in range(rows)]

    def load(
        self, sequences: Listed[Sequence | None], counts: Listed[int], *, width: int | None = None
    ) -> None:
        """The sequences of the next pass, one a row, and how many tokens each gets; their pages must exist.

        Rows with nothing to write, and sequences that are None, take part and leave no trace. `width` is the
        number of entries that `extend` returns, by default whole pages of the longest.
        """
        rows, size = len(self.shown), self.cache.page_size
        assert len(sequences) == len(counts) == rows, f"{len(sequences)} sequences for {rows} rows"
        starts = [0 if sequence is None else sequence.length for sequence in sequences]
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        self.width = width or max(self.cache.pages_for(longest), 1) * size
        assert self.width >= longest
        self.host[: 2 * rows] = torch.tensor([*starts, *counts], dtype=torch.int32)
        table_BN = self.host[2 * rows :].view(rows, -1)
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            pages = [] if sequence is None else sequence.pages
            written = range(starts[row] // size, self.cache.pages_for(starts[row] + count)) if count else ()
            assert all(self.cache.allocator.holders[pages[index]] == 1 for index in written), "reserve first"
            if pages != self.shown[row]:
                table_BN[row] = 0
                table_BN[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
                self.shown[row] = list(pages)
        firsts = [pages[0] if pages else 0 for pages in self.shown]
        follow = size > PAGE_SIZE and firsts == list(range(firsts[0], firsts[0] + rows))
        self.run = firsts[0] if follow and table_BN.shape[1] == 1 else None
        # A kernel that reads pages knows lengths alone, and no row that has fewer new tokens than another.
        self.paged = size == PAGE_SIZE and len({count for count in counts if count}) <= 1
        upload(self.host, self.state)

    def begin(self, num_tokens: int) -> Tensor:
        """Finds the places of the next T tokens of every row; returns their positions, (B, T) int64.

        A row's tokens beyond its count are written where nobody reads, at position 0.
        """
        steps_T = torch.arange(num_tokens, device=self.cache.device)
        meant_BT = steps_T < self.counts_B[:, None]
        positions_BT = (self.starts_B[:, None] + steps_T) * meant_BT
        size = self.cache.page_size
        pages_BT = self.table_BN.gather(1, positions_BT // size).long()
        self.places_BT = (pages_BT * size + positions_BT % size) * meant_BT
        torch.add(self.starts_B, self.counts_B, out=self.lengths_B)
        return positions_BT

    def write(self, layer: int, streams_BTX: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts the new entries of each stream into their places; returns the pools written to."""
        stored = self.cache.layers[layer]
        assert streams_BTX.keys() <= stored.keys(), (
            f"layer {layer} caches {sorted(streams_BTX)}, its parts declare {sorted(stored)}"
        )
        for name, value_BTX in streams_BTX.items():
            stored[name].flatten(0, 1)[self.places_BT] = value_BTX.to(stored[name].dtype)
        return {name: stored[name] for name in streams_BTX}

    def extend(self, layer: int, **streams_BTX: Tensor) -> dict[str, Tensor]:
        """As in `Cache`, (B, width, X); gathers the pages unless the rows lie one behind the other."""
        pools, rows = self.write(layer, streams_BTX), len(self.shown)
        if self.run is not None:
            return {name: pool[self.run : self.run + rows, : self.width] for name, pool in pools.items()}
        table_BN = self.table_BN[:, : self.cache.pages_for(self.width)]
        return {name: pool[table_BN].flatten(1, 2)[:, : self.width] for name, pool in pools.items()}

    def append(self, layer: int, **streams_BTX: Tensor) -> dict[str, Pages]:
        """As in `Cache`; every row that writes must write equally many entries (see `paged`)."""
        assert self.paged, "these rows cannot be read by page; use extend"
        return {
            name: Pages(pool, self.table_BN, self.lengths_B)
            for name, pool in self.write(layer, streams_BTX).items()
        }
