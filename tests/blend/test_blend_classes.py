"""Classes of tokens: that alike rows come together, and that counts take them."""

from dataclasses import replace

import pytest
import torch

from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.blend.classes import classes_of
from sabrage.blend.grams import Gapped, Grams, fits

VOCABULARY = 12
TEXT = torch.randint(VOCABULARY, (900,), generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(VOCABULARY) % 3


def planted(*, noise=0.05):
    """Rows of 60 tokens around five directions, of any length, and which one each is around."""
    generator = torch.Generator().manual_seed(1)
    around_V = torch.arange(60) % 5
    row_VD = torch.eye(5)[around_V] + noise * torch.randn(60, 5, generator=generator)
    return row_VD * torch.rand(60, 1, generator=generator).add(0.1), around_V


def test_tokens_with_alike_rows_are_one_class():
    row_VD, around_V = planted()
    class_V = classes_of([row_VD], torch.ones(60), 20, seed=0)
    assert class_V.dtype is torch.int64
    assert 0 <= class_V.min() <= class_V.max() < 20
    for number in class_V.unique():
        assert len(around_V[class_V == number].unique()) == 1


def test_both_tables_of_rows_part_tokens():
    """One table knows two kinds, the other two others: four in all."""
    first_V, second_V = torch.arange(40) % 2, torch.arange(40) // 2 % 2
    rows = [torch.eye(2)[each_V] for each_V in (first_V, second_V)]
    class_V = classes_of(rows, torch.ones(40), 16, seed=3)
    for number in class_V.unique():
        assert len((2 * first_V + second_V)[class_V == number].unique()) == 1
    assert len(class_V.unique()) >= 4


def test_classes_are_the_same_every_time_and_no_more_than_tokens():
    row_VD, _ = planted()
    counts_V = torch.arange(60)
    one, other = (classes_of([row_VD], counts_V, 7, seed=5) for _ in range(2))
    assert torch.equal(one, other)
    assert classes_of([row_VD[:4]], counts_V[:4], 7, seed=5).max() < 4


def test_long_contexts_fit_where_classes_are_few():
    assert fits((3, 2, 1), 55_108, 0)
    assert not fits((4, 3, 2, 1), 55_108, 0)
    assert fits((-5, -4, -3, -2, -1), 50_304, 256)
    assert fits((-4, -3, 2, 1), 50_304, 64)
    assert not fits((-4, -3, 2, 1), 50_304, 512)
    largest = torch.full((9,), 50_303)
    classes_V = torch.full((50_304,), 255)
    assert int(Gapped(largest, 50_304, (-3, -2, 1), classes_V).count([largest[0]] * 4)) == 9


def test_what_cannot_be_counted_is_told_by_vocabulary():
    part = Blend(candidates=Candidates(gaps=((-3, -2, 1), (4, 3, 2, 1))))
    [problem] = part.unfit_vocabulary(50_304)
    assert "[4, 3, 2, 1]" in problem
    assert not part.unfit_vocabulary(200)
    assert not part.problems()
    assert part.candidates.has_classes()
    assert not replace(part.candidates, gaps=((3, 2),)).has_classes()
    assert replace(part.candidates, classes=0).problems()


def test_mixtures_are_legal():
    part = Blend(text_orders=2, candidates=Candidates(likeliest=4, gaps=((-3, -2, 1), (-2, -1)), classes=5))
    assert fault(part) is None


def test_counts_of_a_text_hold_its_classes():
    grams = Grams(TEXT, VOCABULARY, ((-2, 1), (3, 1)), CLASSES)
    assert [table.back for table in grams.gapped] == [(-2, 1), (3, 1)]
    with pytest.raises(AssertionError):
        Grams(TEXT, VOCABULARY, ((-2, 1),))
