"""Who holds which page of a cache: a free list and a count of holders for each page; no tensors.

Page 0 is never given out: entries that nobody is to read are written there.
"""

from dataclasses import dataclass, field


class CacheFull(ValueError):
    """No page is left: says how many were needed, how many are held, and the remedy."""


@dataclass(eq=False)
class Sequence:
    """One sequence in a cache: its pages in order, and how many tokens they hold.

    Pages may reach beyond `length`; a page may belong to several sequences, which then only read it.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PageAllocator:
    """Gives out pages 1 to `num_pages`. `holders[p]` counts the sequences that hold page p."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = list(range(num_pages, 0, -1))
        self.holders = [0] * (num_pages + 1)

    def take(self, count: int) -> list[int]:
        """Pages that nobody holds, now held once. Raises CacheFull, nothing taken, when there are too few."""
        if count > len(self.free):
            raise CacheFull(
                f"the cache is full: {count} more pages were needed, {self.num_pages - len(self.free)} of "
                f"{self.num_pages} are held; let sequences end, ask for fewer tokens, or give it more pages"
            )
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: list[int]) -> list[int]:
        """The same pages, each held once more."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is shared and nobody holds it"
            self.holders[page] += 1
        return list(pages)

    def drop(self, pages: list[int]) -> None:
        """Lets go of the pages; those that nobody else holds are free again."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is dropped and nobody holds it"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)
