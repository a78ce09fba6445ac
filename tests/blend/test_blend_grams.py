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


@pytest.mark.parametrize("most", [1, 2, 6])
@pytest.mark.parametrize("vocabulary", [2, 5, 300])
@pytest.mark.parametrize("size", [8, 9, 200])
def test_followers_stand_at_even_places_of_all_that_followed(vocabulary, size, most):
    generator = torch.Generator().manual_seed(vocabulary + size)
    text_N = torch.randint(vocabulary, (size,), generator=generator)
    grams, ring = Grams(text_N, vocabulary), text_N.tolist() * 2
    for length in range(1, LONGEST):
        # Those that begin anywhere in the ring, and some that may be nowhere; the last one sorts last.
        asked = [ring[start : start + length] for start in range(0, size)]
        asked += torch.randint(vocabulary, (5, length), generator=generator).tolist()
        asked += [[vocabulary - 1] * length]
        tokens_NM, known_N = grams.followers(list(torch.tensor(asked).T), most)
        assert tokens_NM.shape == (len(asked), most)
        for run, tokens, known in zip(asked, tokens_NM.tolist(), known_N.tolist(), strict=True):
            followed = sorted(ring[s + length] for s in range(size) if ring[s : s + length] == run)
            total = len(followed)
            assert known == (total > 0)
            if known:
                assert tokens == [followed[(2 * part + 1) * total // (2 * most)] for part in range(most)]
                often = {token for token in followed if followed.count(token) * most >= total}
                assert often <= set(tokens)


def test_one_context_is_looked_up_with_many_tokens():
    text_N = torch.randint(5, (300,), generator=torch.Generator().manual_seed(4))
    grams, each_1C = Grams(text_N, 5), torch.arange(5)[None]
    for length in range(1, LONGEST):
        run = [text_N.roll(-back)[:40, None] for back in range(length)]
        together, _ = grams.count([*run, each_1C.expand(40, 5)])
        alone, _ = grams.count([*(token.expand(40, 5) for token in run), each_1C.expand(40, 5)])
        assert torch.equal(together, alone)


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
        cuda_run = [token.cuda() for token in run]
        found = [(here.count(run), there.count(cuda_run))]
        if length < LONGEST:
            found.append((here.followers(run, 6), there.followers(cuda_run, 6)))
        for pair in found:
            assert all(torch.equal(one, other.cpu()) for one, other in zip(*pair, strict=True))
