"""Contexts with gaps: counted, looked up and legal, against working it out by hand."""

from dataclasses import replace

import pytest
import torch

from sabrage.blend import evidence
from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.blend.evidence import evidence_of
from sabrage.blend.gate import Gate, fit
from sabrage.blend.grams import Gapped, Grams
from sabrage.config import from_json, to_json

VOCABULARY, LENGTH = 7, 40
TEXT = torch.randint(VOCABULARY, (900,), generator=torch.Generator().manual_seed(0))
GAPS = ((2,), (3, 2), (5, 1), (4, 2, 1))
CLASSES = 3
PLAIN = Candidates(followers=2, likeliest=3, nearest=0)
PART = Blend(text_orders=3, cache=(), candidates=replace(PLAIN, gaps=GAPS))
HEAD = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3))


def followers(back, context):
    """The tokens of the text, a ring, before which `context` stands; below zero its classes count."""
    text, size = TEXT.tolist(), len(TEXT)

    def known(token, distance):
        return token if distance > 0 else token % CLASSES

    wanted = [known(token, distance) for token, distance in zip(context, back, strict=True)]
    return [
        text[at]
        for at in range(size)
        if [known(text[(at - abs(distance)) % size], distance) for distance in back] == wanted
    ]


def rows():
    """Three rows of documents that begin with 0, (3, T) tokens and targets, and states of the network."""
    generator = torch.Generator().manual_seed(1)
    rows_BT = torch.randint(1, VOCABULARY, (3, LENGTH + 1), generator=generator)
    rows_BT[:, 0] = rows_BT[1, 17] = rows_BT[2, 30:32] = 0
    return rows_BT[:, :-1], rows_BT[:, 1:], torch.randn(3, LENGTH, 5, generator=generator)


def said(part):
    tokens_BT, targets_BT, h_BTD = rows()
    grams = Grams(TEXT, VOCABULARY, part.gaps())
    documents_BT = (tokens_BT == 0).cumsum(1)
    head = lambda h_MD: h_MD @ HEAD  # noqa: E731
    return evidence_of(part, grams, head, tokens_BT, targets_BT, documents_BT, h_BTD, vocab_size=VOCABULARY)


@pytest.mark.parametrize("back", [*GAPS, (-1,), (-3, 2), (-4, -2, 1), (3, -1), (-5, -4, -3, -2, -1)])
def test_contexts_with_gaps_are_counted_as_by_hand(back):
    table = Gapped(TEXT, VOCABULARY, back, torch.arange(VOCABULARY) % CLASSES)
    run_AN = torch.randint(VOCABULARY, (len(back), 60), generator=torch.Generator().manual_seed(4))
    counts, hits = table.count(run_AN), table.count([*run_AN[..., None], torch.arange(VOCABULARY)])
    assert hits.shape == (60, VOCABULARY)
    for number, context in enumerate(run_AN.T.tolist()):
        found = followers(back, context)
        assert counts[number] == len(found)
        assert hits[number].tolist() == [found.count(token) for token in range(VOCABULARY)]
    assert counts.sum() > 0


def test_largest_token_ids_are_counted():
    """Four digits to the base of the largest vocabulary fill 63 bits."""
    vocab_size = 55_108
    text_N = torch.tensor([vocab_size - 1] * 5 + [0, 1])
    last = torch.tensor(vocab_size - 1)
    assert int(Gapped(text_N, vocab_size, (3, 2, 1)).count([last] * 4)) == 2
    assert int(Gapped(text_N, vocab_size, (3, 2, 1)).count([last] * 3)) == 3
    assert int(Gapped(text_N, vocab_size, (4,)).count([last])) == 5


def test_what_is_known_after_gaps_as_by_hand():
    tokens_BT, _, h_BTD = rows()
    with_gaps, plain = said(PART), said(replace(PART, candidates=PLAIN))
    extra = with_gaps.candidates.features_NCX[:, :, plain.candidates.features_NCX.shape[2] :]
    assert extra.shape[2] == 2 * len(GAPS)
    shown, after_the_plain = 0, 1 + 3 * 3 + PART.document_orders - 1
    for index in range(3 * LENGTH):
        row, place = divmod(index, LENGTH)
        start = max(at for at in range(place + 1) if at == 0 or tokens_BT[row, at] == 0)
        log_V = torch.log_softmax(h_BTD[row, place] @ HEAD, 0)
        for number, back in enumerate(GAPS):
            at = [place + 1 - distance for distance in back]
            found = followers(back, tokens_BT[row, at].tolist()) if at[0] >= start else []
            feature = with_gaps.features_NF[index, after_the_plain + number]
            torch.testing.assert_close(feature, torch.tensor(float(len(found))).log1p() / 4 - 1)
            for column in range(extra.shape[1]):
                log = with_gaps.candidates.log_NC[index, column]
                if log == -torch.inf:
                    continue
                token = int((log_V - log).abs().argmin())
                hits = torch.tensor(float(found.count(token)))
                share = ((hits + 0.05) / (len(found) + 1)).log() / 4 + 1 if found else torch.tensor(0.0)
                expected = torch.stack((hits.log1p() / 4, share))
                torch.testing.assert_close(extra[index, column, 2 * number : 2 * number + 2], expected)
                shown += bool(hits)
    assert shown > 100


def test_beside_the_gaps_all_is_what_it_was_bit_for_bit():
    with_gaps, plain = said(PART), said(replace(PART, candidates=PLAIN))
    width = plain.candidates.features_NCX.shape[2]
    assert torch.equal(with_gaps.candidates.features_NCX[:, :, :width], plain.candidates.features_NCX)
    assert torch.equal(with_gaps.log_NE, plain.log_NE)
    assert torch.equal(with_gaps.network_N, plain.network_N)
    assert with_gaps.features_NF.shape[1] == plain.features_NF.shape[1] + len(GAPS)


def test_a_gate_learns_from_a_gap_what_nothing_else_tells():
    """In this text a token is the one three before it, whatever stands between."""
    generator = torch.Generator().manual_seed(5)
    text_N = torch.randint(1, 97, (6000,), generator=generator)
    text_N[3::2] = text_N[:-3:2]
    losses = []
    for gaps in ((), ((3,),)):
        part = Blend(
            text_orders=1, cache=(), seen=False, candidates=replace(PLAIN, likeliest=97, most=97, gaps=gaps)
        )
        grams = Grams(text_N[:4000], 97, gaps)
        rows_BT = text_N[4000:5956].view(12, 163)
        h_BTD = torch.zeros(12, 162, 1)
        made = evidence_of(
            part, grams, lambda h_MD: h_MD.expand(-1, 97), rows_BT[:, :-1], rows_BT[:, 1:], None, h_BTD,
            vocab_size=97,
        )  # fmt: skip
        gate = fit(made, hidden=8, steps=80, batch=512, lr=0.02, seed=0, rescoring_hidden=8)
        losses.append(-float(gate(made).mean()))
    assert losses[1] < losses[0] - 0.5


@pytest.mark.parametrize(
    "part",
    [PART, replace(PART, text_orders=1), Blend(candidates=Candidates(gaps=((3, 2), (3, 1), (4, 3, 2))))],
)
def test_mixtures_are_legal(part):
    assert fault(part) is None


def test_contexts_that_reach_into_another_document_are_caught(monkeypatch):
    honest = evidence.with_gaps
    monkeypatch.setattr(
        evidence,
        "with_gaps",
        lambda grams, rows: honest(grams, replace(rows, depth_BT=rows.depth_BT + 9)),
    )
    assert fault(PART) is not None


def test_a_context_that_holds_the_target_is_caught(monkeypatch):
    honest = evidence.Rows.back
    monkeypatch.setattr(
        evidence.Rows, "back", lambda self, far: honest(self, [distance - 1 for distance in far])
    )
    assert fault(replace(PART, text_orders=1)) is not None


@pytest.mark.parametrize("back", [(), (0,), (1, 2), (2, 2), (-2, 2), (-1, 3)])
def test_gaps_that_are_none_are_told(back):
    [problem] = replace(PLAIN, gaps=((3, 2), back)).problems()
    assert str(list(back)) in problem
    assert not replace(PLAIN, gaps=GAPS).problems()


def test_gaps_need_a_text():
    assert any("candidates.gaps" in problem for problem in replace(PART, text_orders=0).problems())
    assert not PART.problems()


def test_gaps_come_back_from_json():
    assert from_json(to_json(PART), Blend) == PART


def test_gate_of_gaps_has_the_shape_that_the_evidence_asks_for():
    gate = Gate.of(said(PART), hidden=4, rescoring_hidden=4)
    assert gate(said(PART)).isfinite().all()
