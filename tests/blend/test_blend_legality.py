"""That mixtures with candidates are legal, and that a leak would be caught."""

from dataclasses import replace

import pytest
import torch

from sabrage.blend import candidates, evidence, neural
from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates, listed
from sabrage.blend.document import Occurrences
from sabrage.blend.rescoring import Rescoring

FEW = Candidates(followers=2, likeliest=3, nearest=2)
ONE = Blend(text_orders=0, document_orders=1, seen=False, cache=())


@pytest.mark.parametrize(
    "part",
    [
        Blend(candidates=Candidates()),
        Blend(candidates=FEW),
        Blend(candidates=replace(FEW, most=5)),
        Blend(candidates=Candidates(), text_orders=1),
        replace(ONE, text_orders=7, candidates=FEW),
        replace(ONE, text_orders=2, candidates=Candidates(followers=3, likeliest=1)),
        replace(ONE, candidates=FEW),
        replace(ONE, cache=(20.0,), candidates=replace(FEW, nearest=4)),
    ],
)
def test_mixtures_are_legal(part):
    assert fault(part) is None


honest_listed, honest_before, honest_followed = listed, Occurrences.before, candidates.followed
honest_gains = Rescoring.gains


def with_the_target(part, grams, orders, rows):
    listed_NL = honest_listed(part, grams, orders, rows)
    return torch.cat((listed_NL, rows.targets_BT.reshape(-1, 1)), 1)


def with_the_token_after_it(part, grams, orders, rows):
    listed_NL = honest_listed(part, grams, orders, rows)
    return torch.cat((listed_NL, rows.targets_BT.roll(-1, 1).reshape(-1, 1)), 1)


def too_deep(part, grams, orders, rows):
    return honest_listed(part, grams, orders, replace(rows, depth_BT=rows.depth_BT + 9))


@pytest.mark.parametrize("leak", [with_the_target, with_the_token_after_it, too_deep])
def test_a_leak_in_the_choice_of_candidates_is_caught(monkeypatch, leak):
    part = replace(ONE, text_orders=7, candidates=Candidates(followers=1, likeliest=2))
    assert fault(part) is None
    monkeypatch.setattr(evidence, "listed", leak)
    assert fault(part) is not None


def test_a_target_among_what_stood_before_is_caught(monkeypatch):
    monkeypatch.setattr(
        Occurrences, "before", lambda self, asked_MC, place_M: honest_before(self, asked_MC, place_M + 1)
    )
    assert fault(replace(ONE, candidates=FEW)) is not None


def test_what_stands_in_other_documents_or_comes_later_is_caught(monkeypatch):
    monkeypatch.setattr(
        Occurrences, "before", lambda self, asked_MC, _: (torch.searchsorted(self.keys, asked_MC),) * 2
    )
    assert fault(replace(ONE, candidates=FEW)) is not None


def test_a_cache_that_knows_the_present_follower_is_caught(monkeypatch):
    part = replace(ONE, cache=(20.0,), candidates=FEW)
    honest = neural.Rows.before
    monkeypatch.setattr(neural.Rows, "before", lambda self, *at, itself: honest(self, *at, itself=True))
    assert fault(part) is not None
    monkeypatch.undo()
    assert fault(part) is None
    shares = candidates.cache_shares
    later = lambda rows, b, tokens_NC: [x_NC.roll(-1, 0) for x_NC in shares(rows, b, tokens_NC)]  # noqa: E731
    monkeypatch.setattr(candidates, "cache_shares", later)
    assert fault(part) is not None


def test_candidates_that_are_given_too_much_are_caught(monkeypatch):
    def generous(self, features_NF, of):
        return honest_gains(self, features_NF, of) + 0.01 * (of.target_N >= 0)

    monkeypatch.setattr(Rescoring, "gains", generous)
    assert "sum to" in fault(replace(ONE, candidates=FEW))
