"""What experts say, against working it out by hand, and that a leak in it would be caught."""

from dataclasses import replace

import pytest
import torch

from sabrage.blend import audit, document, evidence, neural
from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.document import contexts, in_document
from sabrage.blend.evidence import Evidence, depths, evidence_of, in_text
from sabrage.blend.grams import Grams
from sabrage.blend.neural import Rows, cached, network_says

VOCABULARY, LENGTH = 6, 30


@pytest.fixture(params=[2048, 7])
def rows(request, monkeypatch):
    """Three rows of documents that begin with 0, worked on as wholes or in short pieces."""
    monkeypatch.setattr(neural, "TOKENS_AT_ONCE", request.param)
    generator = torch.Generator().manual_seed(1)
    rows_BT = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=generator)
    tokens_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    depth_BT, group_BT = depths(tokens_BT, (tokens_BT == 0).cumsum(1))
    return Rows(tokens_BT, targets_BT, group_BT, depth_BT, torch.randn(3, LENGTH, 5, generator=generator))


def places(rows):
    """(row, place, first place of its document, index) of every place."""
    for row in range(3):
        start = 0
        for place in range(LENGTH):
            start = place if rows.tokens_BT[row, place] == 0 else start
            yield row, place, start, row * LENGTH + place


def test_a_document_is_counted_as_by_hand(rows):
    found = in_document(contexts(4, rows, VOCABULARY), rows, VOCABULARY)
    for row, place, start, index in places(rows):
        for order in range(4):
            count = hits = 0
            context = rows.tokens_BT[row, place - order + 1 : place + 1].tolist()
            for earlier in range(start + max(order - 1, 0), place):
                if rows.tokens_BT[row, earlier - order + 1 : earlier + 1].tolist() == context:
                    count += 1
                    hits += int(rows.targets_BT[row, earlier] == rows.targets_BT[row, place])
            if place - start + 1 < order:
                count = hits = 0
            assert (found[order][0][index], found[order][1][index]) == (count, hits)


def test_the_text_is_asked_for_contexts_within_the_document(rows):
    text_N = torch.randint(VOCABULARY, (400,), generator=torch.Generator().manual_seed(2))
    grams = Grams(text_N, VOCABULARY)
    found = in_text(grams, 7, rows)
    for row, place, start, index in places(rows):
        for order in range(1, 8):
            count = hits = 0
            if place - start + 1 >= order:
                context = list(rows.tokens_BT[row, place - order + 1 : place + 1])
                count, _ = grams.count(context)
                hits, _ = grams.count([*context, rows.targets_BT[row, place]])
            assert (found[order - 1][0][index], found[order - 1][1][index]) == (count, hits)


def test_the_network_and_it_restricted_to_what_was_seen_as_by_hand(rows):
    head_DV = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3))
    first_BT = torch.zeros_like(rows.tokens_BT, dtype=torch.bool)
    for row, place, start, _ in places(rows):
        first_BT[row, place] = rows.tokens_BT[row, place] not in rows.tokens_BT[row, start:place]
    says = network_says(lambda h_MD: h_MD @ head_DV, rows, first_BT)
    for row, place, start, index in places(rows):
        p_V = torch.softmax(rows.h_BTD[row, place] @ head_DV, 0)
        target = int(rows.targets_BT[row, place])
        torch.testing.assert_close(says.log_N[index].exp(), p_V[target])
        seen = set(rows.tokens_BT[row, start : place + 1].tolist())
        expected = p_V[target] / sum(p_V[token] for token in seen) if target in seen else torch.zeros(())
        torch.testing.assert_close(says.restricted_N[index].exp(), expected)


def test_the_cache_as_by_hand(rows):
    log_NC, *_ = cached(rows, (3.0, 0.5))
    for row, place, start, index in places(rows):
        if place == start:
            continue
        h_SD = torch.nn.functional.normalize(rows.h_BTD[row, start : place + 1], dim=1)
        same_S = rows.targets_BT[row, start:place] == rows.targets_BT[row, place]
        for column, b in enumerate((3.0, 0.5)):
            weight_S = torch.softmax(b * h_SD[:-1] @ h_SD[-1], 0)
            torch.testing.assert_close(log_NC[index, column].exp(), weight_S[same_S].sum())


def test_a_row_without_documents_is_one_document(rows):
    depth_BT, group_BT = depths(rows.tokens_BT, None)
    assert depth_BT.tolist() == [list(range(1, LENGTH + 1))] * 3
    assert len(group_BT.unique()) == 3


@pytest.mark.parametrize("changes", [{}, {"seen": False}, {"cache": ()}, {"document_orders": 0}])
def test_evidence_has_a_column_for_each_expert_and_is_cut_and_joined(rows, changes):
    part = Blend(text_orders=0, **changes)
    table = rows.tokens_BT, rows.targets_BT, (rows.tokens_BT == 0).cumsum(1), rows.h_BTD
    head_DV = torch.randn(5, VOCABULARY)
    whole = evidence_of(part, None, lambda h_MD: h_MD @ head_DV, *table, vocab_size=VOCABULARY)
    assert whole.log_NE.shape == whole.known_NE.shape == (3 * LENGTH, part.num_experts())
    again = Evidence.joined([whole[:40], whole[40:]])
    assert len(again) == 3 * LENGTH
    assert whole.candidates is again.candidates is None
    columns = [name for name in vars(whole) if name != "candidates"]
    assert all(torch.equal(getattr(whole, name), getattr(again, name)) for name in columns)


ALONE = Blend(text_orders=0, document_orders=0, seen=False, cache=())


@pytest.mark.parametrize(
    "changes",
    [
        {"text_orders": 7, "document_orders": 4, "seen": True, "cache": (10.0, 20.0)},
        {"text_orders": 7},
        {"text_orders": 1, "document_orders": 1},
        {"document_orders": 8},
        {"seen": True},
        {"cache": (2.0,)},
    ],
)
def test_mixtures_are_legal(changes):
    assert fault(replace(ALONE, **changes)) is None


def inclusive(key_N):
    return evidence_earlier(key_N) + 1


def of_all_time(key_N):
    _, inverse, counts = torch.unique(key_N, return_inverse=True, return_counts=True)
    return counts[inverse] - 1


def of_any_document(tokens_BT, documents_BT):
    depth_BT, group_BT = evidence_depths(tokens_BT, documents_BT)
    return depth_BT, group_BT // tokens_BT.shape[1] * tokens_BT.shape[1]


def of_any_row(tokens_BT, documents_BT):
    depth_BT, group_BT = evidence_depths(tokens_BT, documents_BT)
    return depth_BT, group_BT % tokens_BT.shape[1]


def too_deep(tokens_BT, documents_BT):
    depth_BT, group_BT = evidence_depths(tokens_BT, documents_BT)
    return depth_BT + 9, group_BT


evidence_earlier, evidence_depths, rows_before = document.earlier, evidence.depths, Rows.before


@pytest.mark.parametrize(
    ("module", "name", "leak"),
    [
        (document, "earlier", inclusive),
        (document, "earlier", of_all_time),
        (evidence, "depths", of_any_document),
        (evidence, "depths", of_any_row),
        (evidence, "depths", too_deep),
    ],
)
def test_a_leak_in_counts_is_caught(monkeypatch, module, name, leak):
    monkeypatch.setattr(module, name, leak)
    assert fault(replace(ALONE, text_orders=7, document_orders=4)) is not None


def at_once(self, row, first, end, *, itself):
    return rows_before(self, row, first, end, itself=True)


def of_all(self, row, first, end, *, itself):
    return rows_before(self, row, first, end, itself=itself).new_ones(end - first, end)


@pytest.mark.parametrize(
    ("alone", "leak"), [({"seen": True}, of_all), ({"cache": (9.0,)}, of_all), ({"cache": (9.0,)}, at_once)]
)
def test_a_leak_from_the_future_is_caught(monkeypatch, alone, leak):
    monkeypatch.setattr(Rows, "before", leak)
    assert fault(replace(ALONE, **alone)) is not None


def test_a_gate_that_gives_too_much_is_caught(monkeypatch):
    class Generous(audit.Gate):
        def shares(self, given):
            return super().shares(given) + 0.01

    monkeypatch.setattr(audit, "Gate", Generous)
    assert "sum to" in fault(Blend())
