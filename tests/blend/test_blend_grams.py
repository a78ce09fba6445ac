"""Counts of runs of tokens against counting by hand."""

import pytest
import torch

from sabrage.blend.grams import LONGEST, Grams, largest_vocabulary


def by_hand(text, run):
    """(occurrences in the ring, distinct ways to go on to the end of its four or eight tokens)."""
    size = len(text)
    ring = text + text[:LONGEST] if size >= LONGEST else text * (LONGEST + 1)
    length, end = len(run), 4 if len(run) <= 4 else 8
    places = [start for start in range(size) if ring[start : start + length] == run]
    return len(places), len({tuple(ring[start : start + end]) for start in places})


@pytest.mark.parametrize("vocabulary", [2, 5, 300])
@pytest.mark.parametrize("size", [8, 200])
def test_every_run_is_counted_as_by_hand(vocabulary, size):
    generator = torch.Generator().manual_seed(vocabulary + size)
    text_N = torch.randint(vocabulary, (size,), generator=generator)
    text, grams = text_N.tolist(), Grams(text_N, vocabulary)
    for length in range(1, LONGEST + 1):
        asked = [text[start : start + length] for start in range(0, size - length, 3)]
        asked += torch.randint(vocabulary, (5, length), generator=generator).tolist()
        occurrences, ways = grams.count(list(torch.tensor(asked).T))
        assert list(zip(occurrences.tolist(), ways.tolist(), strict=True)) == [
            by_hand(text, run) for run in asked
        ]


def test_the_ways_on_sum_to_the_occurrences():
    text_N = torch.randint(7, (500,), generator=torch.Generator().manual_seed(0))
    grams, each_V = Grams(text_N, 7), torch.arange(7)
    for length in range(1, LONGEST):
        run = [text_N[480 + back] for back in range(length)]
        on, _ = grams.count([*(token.expand(7) for token in run), each_V])
        all_of_it, _ = grams.count(run)
        assert on.sum() == all_of_it > 0


def test_the_largest_vocabulary_fits_and_one_more_is_refused():
    top = largest_vocabulary()
    assert top > 50_304
    text_N = torch.tensor([top - 1] * 9 + [0])
    occurrences, _ = Grams(text_N, top).count([torch.tensor([top - 1])] * 4)
    assert occurrences.tolist() == [6]
    with pytest.raises(ValueError, match=str(top)):
        Grams(text_N, top + 1)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        Grams(torch.zeros(0, dtype=torch.long), 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_are_the_same_on_the_gpu():
    text_N = torch.randint(50_257, (100_000,), generator=torch.Generator().manual_seed(0)) // 997
    here, there = Grams(text_N, 50_257), Grams(text_N.cuda(), 50_257)
    for length in range(1, LONGEST + 1):
        run = [text_N.roll(-back)[:5000] for back in range(length)]
        for one, other in zip(here.count(run), there.count([token.cuda() for token in run]), strict=True):
            assert torch.equal(one, other.cpu())
