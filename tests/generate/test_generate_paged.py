"""Pages: none is lost, none has two owners, and what was written is what is read."""

from dataclasses import dataclass, replace

import pytest
import torch
from contracts import build, draw_tokens, shrink
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.context import Context
from sabrage.generate.paged import PAGE_SIZE, PagedCache
from sabrage.generate.pages import CacheFull, PageAllocator, Sequence
from sabrage.model.lm import ModelSpec
from sabrage.parts import FeedForward, Mixer
from sabrage.recipes import find


@dataclass(frozen=True, kw_only=True)
class Two(Mixer):
    """Caches two streams of different widths."""

    def build(self, *, dim, layer):
        raise NotImplementedError

    def streams(self, dim):
        return {"wide": 3, "narrow": 1}

    def flops(self, dim, sequence_length):
        return 0


@dataclass(frozen=True, kw_only=True)
class One(FeedForward):
    """A feed-forward with a stream of its own."""

    def build(self, *, dim, layer):
        raise NotImplementedError

    def streams(self, dim):
        return {"fed": 2}

    def flops(self, dim):
        return 0


SPEC: ModelSpec = replace(find("demo").model, layers=2, mixers=(Two(),), feedforwards=(One(),))
WIDTHS = {"wide": 3, "narrow": 1, "fed": 2}
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "append", "append", "fork", "free"]), st.integers(0, 99), st.integers(1, 9)
    ),
    min_size=20,
    max_size=40,
)


def append(cache, sequences, news):
    """Writes each sequence's new numbers in one pass; returns all entries that the pass read, by layer."""
    counts, read = [len(new) for new in news], {}
    values_BT = torch.full((len(news), max(counts)), float("nan"))
    for row, new in enumerate(news):
        values_BT[row, : len(new)] = torch.tensor(new)
    view = cache.view(rows=len(sequences), max_length=300)
    view.load(sequences, counts)
    view.begin(max(counts))
    for layer in range(SPEC.layers):
        made = streams(values_BT, layer)
        fed = {"fed": made.pop("fed")}
        read[layer] = view.extend(layer, **made) | view.extend(layer, **fed)
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.length += count
    return read


def streams(values_BT, layer):
    """Every stream's entries where a token is one number."""
    return {
        name: (values_BT + 1000.0 * layer + 100.0 * index)[..., None].expand(*values_BT.shape, width)
        for index, (name, width) in enumerate(WIDTHS.items())
    }


def check(cache, known):
    """Pages are counted right, and what every sequence holds is what the dictionary says."""
    holders = [0] * (cache.allocator.num_pages + 1)
    for sequence, _ in known.values():
        for page in sequence.pages:
            holders[page] += 1
    assert holders == cache.allocator.holders
    assert sorted(cache.allocator.free) == [page for page, count in enumerate(holders) if page and not count]
    for sequence, numbers in known.values():
        assert sequence.length == len(numbers)
        for layer, stored in enumerate(cache.layers):
            for name, expected in streams(torch.tensor(numbers), layer).items():
                assert torch.equal(stored[name][sequence.pages].flatten(0, 1)[: len(numbers)], expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ACTIONS)
def test_random_admissions_appends_forks_and_ends_agree_with_a_dictionary(actions):
    cache = PagedCache(SPEC, num_pages=9, page_size=4)
    known: dict[int, tuple[Sequence, list[float]]] = {}
    fresh = iter(range(10_000))
    for name, (action, which, count) in enumerate(actions):
        chosen = sorted(known)[which % len(known)] if known else None
        if action == "admit":
            known[name] = (Sequence(), [])
        elif chosen is None:
            continue
        elif action == "fork":
            known[name] = (cache.fork(known[chosen][0]), list(known[chosen][1]))
        elif action == "free":
            cache.release(known.pop(chosen)[0])
        else:
            # The chosen one and its neighbour grow by different lengths, in one pass.
            grown = [known[key] for key in sorted(known)[which % len(known) :][:2]]
            news = [[float(next(fresh)) for _ in range(count + row)] for row in range(len(grown))]
            try:
                for (sequence, _), new in zip(grown, news, strict=True):
                    cache.reserve(sequence, len(new))
            except CacheFull:
                continue
            read = append(cache, [sequence for sequence, _ in grown], news)
            for row, ((_, numbers), new) in enumerate(zip(grown, news, strict=True)):
                numbers += new
                for layer, entries in read.items():
                    for stream, expected in streams(torch.tensor(numbers), layer).items():
                        assert torch.equal(entries[stream][row, : len(numbers)], expected)
        check(cache, known)
    for sequence, _ in known.values():
        cache.release(sequence)
    check(cache, {})


def test_a_full_cache_says_what_is_needed_and_held_and_takes_nothing():
    cache = PagedCache(SPEC, num_pages=4, page_size=4)
    first, second = Sequence(), Sequence()
    cache.reserve(first, 9)
    with pytest.raises(CacheFull, match=r"2 more pages were needed, 3 of 4 are held; let sequences end"):
        cache.reserve(second, 5)
    assert second.pages == []
    cache.release(first)
    cache.reserve(second, 16)
    assert sorted(second.pages) == [1, 2, 3, 4]


def test_appending_moves_nothing_that_is_there():
    cache = PagedCache(SPEC, num_pages=8, page_size=4)
    sequence = Sequence()
    cache.reserve(sequence, 6)
    before, pages = [pool.data_ptr() for pool in cache.layers[0].values()], list(sequence.pages)
    append(cache, [sequence], [[1.0] * 6])
    cache.reserve(sequence, 20)
    assert sequence.pages[:2] == pages
    assert [pool.data_ptr() for pool in cache.layers[0].values()] == before


def test_a_fork_shares_full_pages_and_copies_only_the_one_it_writes_to():
    cache = PagedCache(SPEC, num_pages=8, page_size=4)
    first = Sequence()
    cache.reserve(first, 10)
    append(cache, [first], [[float(n) for n in range(10)]])
    second = cache.fork(first)
    assert second.pages == first.pages
    cache.reserve(second, 1)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert len(cache.allocator.free) == 8 - 4


def test_a_shared_page_is_not_written_to_without_a_reservation():
    cache = PagedCache(SPEC, num_pages=8, page_size=4)
    first = Sequence()
    cache.reserve(first, 2)
    append(cache, [first], [[1.0]])
    cache.fork(first)
    with pytest.raises(AssertionError, match="reserve first"):
        append(cache, [first], [[2.0]])


def test_a_page_that_nobody_holds_cannot_be_dropped():
    allocator = PageAllocator(2)
    (page,) = allocator.take(1)
    allocator.drop([page])
    with pytest.raises(AssertionError, match="nobody holds it"):
        allocator.drop([page])


def test_bytes_are_what_the_streams_declare():
    cache = PagedCache(SPEC, num_pages=5, page_size=4, dtype=torch.bfloat16)
    assert cache.page_bytes() == 2 * 4 * (3 + 1 + 2) * 2
    assert cache.bytes() == 6 * cache.page_bytes()


def test_pages_name_the_entries_where_they_lie():
    cache = PagedCache(SPEC, num_pages=6)
    long, short = Sequence(), Sequence()
    for sequence, length in ((long, 70), (short, 3)):
        cache.reserve(sequence, length)
        append(cache, [sequence], [[float(n) for n in range(length)]])
    for sequence in (long, short):
        cache.reserve(sequence, 1)
    view = cache.view(rows=3, max_length=128)
    view.load([short, None, long], [1, 0, 1])
    assert view.paged
    view.begin(1)
    pages = view.append(0, wide=torch.full((3, 1, 3), 7.0))["wide"]
    assert pages.lengths_B.tolist() == [4, 0, 71]
    assert pages.table_BN.dtype == pages.lengths_B.dtype == torch.int32
    assert pages.table_BN.is_contiguous()
    for row, (length, before) in {0: (4, 3), 2: (71, 70)}.items():
        places = [(int(pages.table_BN[row, s // PAGE_SIZE]), s % PAGE_SIZE) for s in range(length)]
        entries = torch.stack([pages.pages_PSX[place] for place in places])
        assert entries[:, 0].tolist() == [*map(float, range(before)), 7.0]


def test_tokens_that_are_not_meant_have_a_position_that_exists_and_a_place_that_nobody_reads():
    cache = PagedCache(SPEC, num_pages=6, page_size=4)
    rows = [Sequence(), Sequence()]
    for sequence, length in zip(rows, (6, 2), strict=True):
        cache.reserve(sequence, length + 1)
        append(cache, [sequence], [[1.0] * length])
    view = cache.view(rows=3, max_length=8)
    view.load([rows[0], None, rows[1]], [1, 0, 2])
    assert view.begin(2).tolist() == [[6, 0], [0, 0], [2, 3]]
    pages = [sequence.pages for sequence in rows]
    assert view.places_BT.tolist() == [
        [4 * pages[0][1] + 2, 0], [0, 0], [4 * pages[1][0] + 2, 4 * pages[1][0] + 3]
    ]  # fmt: skip


def test_rows_of_unequal_numbers_of_new_tokens_are_not_for_kernels():
    cache = PagedCache(SPEC, num_pages=6)
    rows = [Sequence(), Sequence()]
    for sequence in rows:
        cache.reserve(sequence, 5)
    view = cache.view(rows=2, max_length=64)
    view.load(rows, [5, 3])
    assert not view.paged
    view.load(rows, [5, 0])
    assert view.paged


@torch.no_grad()
def test_paged_cache_equals_dense_cache():
    model = build(shrink(find("base")).model)
    tokens_BT = draw_tokens(model)
    logits = {}
    for name, pages in {"dense": {"num_pages": 3, "page_size": 128}, "paged": {"num_pages": 9}}.items():
        cache = PagedCache(model.spec, **pages)
        rows, view = [Sequence() for _ in tokens_BT], cache.view(rows=3, max_length=128)
        for sequence in rows:
            cache.reserve(sequence, 64)
        for piece_BT in tokens_BT.split([20, 1, 43], dim=1):
            view.load(rows, [piece_BT.shape[1]] * 3, width=64)
            assert (view.run is not None) == (name == "dense")
            context = Context(positions_BT=view.begin(piece_BT.shape[1]), cache=view)
            logits.setdefault(name, []).append(model.logits(piece_BT, context))
            for sequence in rows:
                sequence.length += piece_BT.shape[1]
    assert all(map(torch.equal, logits["dense"], logits["paged"]))
