"""What counts say, against counting by hand, and that a leak in it would be caught."""

import pytest
import torch

from sabrage.blend import audit, evidence
from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.evidence import Evidence, rows_evidence
from sabrage.blend.grams import Grams

VOCABULARY = 6


@pytest.fixture
def rows():
    """(tokens_BT, targets_BT, documents_BT): documents begin with 0."""
    rows_BT = torch.randint(VOCABULARY, (3, 31), generator=torch.Generator().manual_seed(1))
    return rows_BT[:, :-1], rows_BT[:, 1:], (rows_BT[:, :-1] == 0).cumsum(1, dtype=torch.int32)


def said(grams, text_orders, document_orders, rows):
    count = rows[0].numel()
    network = torch.full((count,), -1.5), torch.zeros(count, 2)
    return rows_evidence(grams, text_orders, document_orders, VOCABULARY, *rows, network)


def test_a_document_is_counted_as_by_hand(rows):
    tokens_BT, targets_BT, documents_BT = rows
    found = said(None, 0, 4, rows)
    for row in range(3):
        for place in range(30):
            start = next(s for s in range(place + 1) if documents_BT[row, s] == documents_BT[row, place])
            for order in range(4):
                count = hits = 0
                context = tokens_BT[row, place - order + 1 : place + 1].tolist()
                for earlier in range(start + max(order - 1, 0), place):
                    if tokens_BT[row, earlier - order + 1 : earlier + 1].tolist() == context:
                        count += 1
                        hits += int(targets_BT[row, earlier] == targets_BT[row, place])
                if place - start + 1 < order:
                    count = hits = 0
                index = row * 30 + place
                assert (found.count_NE[index, order], found.hits_NE[index, order]) == (count, hits)


def test_the_text_is_asked_for_contexts_within_the_document(rows):
    tokens_BT, targets_BT, documents_BT = rows
    text_N = torch.randint(VOCABULARY, (400,), generator=torch.Generator().manual_seed(2))
    grams = Grams(text_N, VOCABULARY)
    found = said(grams, 7, 0, rows)
    for row, place in ((0, 0), (0, 9), (1, 29), (2, 14)):
        start = next(s for s in range(place + 1) if documents_BT[row, s] == documents_BT[row, place])
        for order in range(1, 8):
            count = hits = 0
            if place - start + 1 >= order:
                context = list(tokens_BT[row, place - order + 1 : place + 1])
                count, _ = grams.count(context)
                hits, _ = grams.count([*context, targets_BT[row, place]])
            index = row * 30 + place
            assert (found.count_NE[index, order - 1], found.hits_NE[index, order - 1]) == (count, hits)


def test_a_row_without_documents_is_one_document(rows):
    tokens_BT, targets_BT, _ = rows
    found = said(None, 0, 1, (tokens_BT, targets_BT, None))
    assert found.count_NE[:, 0].view(3, 30).tolist() == [list(range(30))] * 3


def test_evidence_is_cut_and_joined(rows):
    whole = said(None, 0, 2, rows)
    again = Evidence.joined([whole[:40], whole[40:]])
    assert len(again) == 90
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("orders", [(7, 4), (0, 4), (7, 0), (1, 1), (3, 8)])
def test_mixtures_are_legal(orders):
    assert fault(Blend(text_orders=orders[0], document_orders=orders[1])) is None


def inclusive(key_N):
    return evidence_earlier(key_N) + 1


def of_all_time(key_N):
    _, inverse, counts = torch.unique(key_N, return_inverse=True, return_counts=True)
    return counts[inverse] - 1


def of_any_document(tokens_BT, documents_BT):
    depth_N, group_N = evidence_depths(tokens_BT, documents_BT)
    return depth_N, group_N // tokens_BT.shape[1] * tokens_BT.shape[1]


def of_any_row(tokens_BT, documents_BT):
    depth_N, group_N = evidence_depths(tokens_BT, documents_BT)
    return depth_N, group_N % tokens_BT.shape[1]


def too_deep(tokens_BT, documents_BT):
    depth_N, group_N = evidence_depths(tokens_BT, documents_BT)
    return depth_N + 9, group_N


evidence_earlier, evidence_depths = evidence.earlier, evidence.depths


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("earlier", inclusive),
        ("earlier", of_all_time),
        ("depths", of_any_document),
        ("depths", of_any_row),
        ("depths", too_deep),
    ],
)
def test_a_leak_is_caught(monkeypatch, name, leak):
    monkeypatch.setattr(evidence, name, leak)
    assert fault(Blend()) is not None


def test_a_gate_that_gives_too_much_is_caught(monkeypatch):
    class Generous(audit.Gate):
        def shares(self, given):
            return super().shares(given) + 0.01

    monkeypatch.setattr(audit, "Gate", Generous)
    assert "sum to" in fault(Blend())
