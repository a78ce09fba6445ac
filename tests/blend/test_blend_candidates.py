"""Candidates and what is known of them, against working it out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from sabrage.blend import candidates, neural
from sabrage.blend.audit import same
from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates, listed, offered
from sabrage.blend.document import Occurrences, contexts
from sabrage.blend.evidence import Evidence, depths, evidence_of, in_text
from sabrage.blend.gate import Gate
from sabrage.blend.grams import Grams
from sabrage.blend.neural import Rows, cached, network_says

VOCABULARY, LENGTH, ORDERS = 11, 30, 7
FEW = Candidates(followers=2, likeliest=3, nearest=2)
CACHE = (5.0, 20.0)
PART = Blend(candidates=FEW)
TEXT = torch.randint(VOCABULARY, (700,), generator=torch.Generator().manual_seed(2))
HEAD = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[(2048, 4096), (7, 13)], ids=["whole", "in pieces"])
def rows(request, monkeypatch):
    """Three rows of documents that begin with 0, worked on as wholes or in short pieces."""
    for module, name, value in zip(
        (neural, candidates), ("TOKENS_AT_ONCE", "PLACES_AT_ONCE"), request.param, strict=True
    ):
        monkeypatch.setattr(module, name, value)
    generator = torch.Generator().manual_seed(1)
    rows_BT = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=generator)
    # Some contexts of all orders are found in the text.
    rows_BT[0, 3:20], rows_BT[2, 9:25] = TEXT[50:67], TEXT[-16:]
    tokens_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
    depth_BT, group_BT = depths(tokens_BT, (tokens_BT == 0).cumsum(1))
    return Rows(tokens_BT, targets_BT, group_BT, depth_BT, torch.randn(3, LENGTH, 5, generator=generator))


def table(rows, targets_BT=None):
    """What `evidence_of` is given of rows."""
    targets_BT = rows.targets_BT if targets_BT is None else targets_BT
    return rows.tokens_BT, targets_BT, (rows.tokens_BT == 0).cumsum(1), rows.h_BTD


def said(rows, part=PART, targets_BT=None, head=lambda h_MD: h_MD @ HEAD):
    return evidence_of(part, Grams(TEXT, VOCABULARY), head, *table(rows, targets_BT), vocab_size=VOCABULARY)


def found(rows, part=FEW):
    """(tokens (N, C), what is known of them) of the candidates of rows."""
    grams = Grams(TEXT, VOCABULARY)
    counts = [count_N for count_N, _, _ in in_text(grams, ORDERS, rows)]
    listed_NL = listed(part, grams, ORDERS, rows)
    listed_NL = torch.cat((listed_NL, cached(rows, CACHE, part.nearest)[2]), 1)
    says = network_says(lambda h_MD: h_MD @ HEAD, rows, None, listed_NL, part.likeliest, part.most)
    befores = contexts(candidates.DOCUMENT_ORDERS, rows, VOCABULARY)
    return says.candidates[0], offered(rows, grams, counts, befores, says.candidates, VOCABULARY, CACHE)


def places(rows):
    """(index, tokens of the document so far, log-probabilities of the network, target) of every place."""
    for row in range(3):
        start = 0
        for place in range(LENGTH):
            start = place if rows.tokens_BT[row, place] == 0 else start
            document = rows.tokens_BT[row, start : place + 1].tolist()
            log_V = torch.log_softmax(rows.h_BTD[row, place] @ HEAD, 0)
            yield row * LENGTH + place, document, log_V, int(rows.targets_BT[row, place])


def near(rows, index, document):
    """(cosine, follower) of the earlier states of a place's document, the nearest first."""
    row, place = divmod(index, LENGTH)
    h_TD = torch.nn.functional.normalize(rows.h_BTD[row], dim=1)
    earlier = range(place - len(document) + 1, place)
    pairs = [(float(h_TD[place] @ h_TD[at]), int(rows.targets_BT[row, at])) for at in earlier]
    return sorted(pairs, reverse=True)


def after(context):
    """The tokens that followed a context in the text, a ring, sorted."""
    ring, size = TEXT.tolist() * 2, len(context)
    return sorted(ring[at + size] for at in range(len(TEXT)) if ring[at : at + size] == context)


def cached_share(pairs, sharpness, token):
    """What a cache of (cosine, follower) gives to a token, as a feature."""
    weights = [math.exp(sharpness * cosine) for cosine, _ in pairs]
    own = sum(weight for weight, (_, follower) in zip(weights, pairs, strict=True) if follower == token)
    return math.log((own / sum(weights) if pairs else 0.0) + candidates.LEAST_SHARE) / 4 + 1


def test_candidates_followed_in_the_text_or_are_likely(rows):
    tokens_NC, of = found(rows)
    assert tokens_NC.shape == (3 * LENGTH, ORDERS * FEW.followers + FEW.likeliest + FEW.nearest)
    for index, document, log_V, _ in places(rows):
        expected = set(log_V.topk(FEW.likeliest).indices.tolist())
        for order in range(1, min(len(document), ORDERS) + 1):
            followed = after(document[-order:])
            expected |= {followed[len(followed) * part // 4] for part in (1, 3) if followed}
        expected |= {token for _, token in near(rows, index, document)[: FEW.nearest]}
        valid_C = of.log_NC[index] > -torch.inf
        tokens = tokens_NC[index][valid_C].tolist()
        assert sorted(expected) == tokens
        assert (tokens_NC[index][~valid_C] == -1).all()
        torch.testing.assert_close(of.log_NC[index][valid_C], log_V[tokens])


def test_what_is_known_of_candidates_as_by_hand(rows):
    tokens_NC, of = found(rows)
    assert of.features_NCX.shape[2] == 1 + 2 * ORDERS + (1 + ORDERS) + 3 + len(CACHE)
    assert of.features_NCX.isfinite().all()
    for index, document, log_V, _ in places(rows):
        for column in (of.log_NC[index] > -torch.inf).nonzero()[:, 0].tolist():
            token = int(tokens_NC[index, column])
            expected = [log_V[token] / 4 + 1]
            backed = (torch.tensor(after([]).count(token)) + 0.5) / (len(TEXT) + 0.5 * VOCABULARY)
            smoothed = [backed.log() / 8 + 1]
            for order in range(1, ORDERS + 1):
                followed = after(document[-order:]) if order <= len(document) else []
                hits, count = torch.tensor(float(followed.count(token))), len(followed)
                share = ((hits + 0.05) / (count + 1)).log() / 4 + 1 if count else torch.zeros(())
                expected += [hits.log1p() / 4, share]
                if count:
                    backed = (hits + 8 * count**0.75 * backed) / (count + 8 * count**0.75)
                smoothed.append(backed.log() / 4 + 1)
            expected += smoothed
            for order in range(2):
                # Where it stood after the last tokens, if there are so many.
                last = document[len(document) - order :] if order <= len(document) else None
                at = [at for at in range(max(order, 1), len(document)) if document[at] == token]
                at = [at for at in at if document[at - order : at] == last]
                expected.append(torch.tensor(float(len(at))).log1p() / 2)
                if not order:
                    back = torch.tensor(float(len(document) - at[-1]) if at else math.e**8)
                    expected.append(1 - back.log() / 8)
            expected += [torch.tensor(cached_share(near(rows, index, document), b, token)) for b in CACHE]
            torch.testing.assert_close(
                of.features_NCX[index, column], torch.stack(expected), atol=1e-4, rtol=0
            )


def test_the_target_is_found_among_the_candidates_or_is_none(rows):
    tokens_NC, of = found(rows)
    missed = 0
    for index, _, _, target in places(rows):
        number, tokens = int(of.target_N[index]), tokens_NC[index].tolist()
        assert tokens.index(target) == number if target in tokens else number == -1
        missed += number == -1
    assert 0 < missed < 3 * LENGTH


def test_without_a_counted_text_the_network_names_the_candidates(rows):
    part = replace(PART, text_orders=0, cache=())
    whole = evidence_of(part, None, lambda h_MD: h_MD @ HEAD, *table(rows), vocab_size=VOCABULARY)
    assert whole.candidates.log_NC.isfinite().all()
    assert whole.candidates.features_NCX.shape == (3 * LENGTH, FEW.likeliest, 1 + 3)
    nothing_listed = said(rows, replace(PART, candidates=replace(FEW, followers=0, nearest=0)))
    assert torch.equal(nothing_listed.candidates.log_NC, whole.candidates.log_NC)
    the_nearest = said(rows, replace(PART, text_orders=0, candidates=FEW)).candidates
    assert the_nearest.log_NC.shape == (3 * LENGTH, FEW.likeliest + FEW.nearest)


def test_more_likeliest_than_there_are_tokens_are_all_tokens(rows):
    of = said(rows, replace(PART, candidates=replace(FEW, likeliest=99))).candidates
    torch.testing.assert_close(of.log_NC.exp().sum(1), torch.ones(3 * LENGTH))
    assert (of.target_N >= 0).all()


def test_of_too_many_candidates_the_likeliest_are_kept(rows):
    all_of_them = found(rows)
    tokens_NC, of = found(rows, replace(FEW, most=6))
    assert tokens_NC.shape == of.log_NC.shape == (3 * LENGTH, 6)
    for index, _, log_V, target in places(rows):
        likeliest = all_of_them[1].log_NC[index].sort(descending=True).values[:6]
        assert torch.equal(of.log_NC[index], likeliest)
        kept_C = likeliest > -torch.inf
        torch.testing.assert_close(log_V[tokens_NC[index][kept_C]], likeliest[kept_C])
        number = int(of.target_N[index])
        assert (number >= 0) == (target in tokens_NC[index])
        assert number < 0 or tokens_NC[index, number] == target


def test_the_head_is_asked_no_more_than_without_candidates(rows):
    asked = []

    def head(h_MD):
        asked.append(len(h_MD))
        return h_MD @ HEAD

    said(rows, replace(PART, candidates=None), head=head)
    plain = asked.copy()
    asked.clear()
    said(rows, head=head)
    assert asked == plain
    assert sum(asked) == 3 * LENGTH


def test_beside_the_candidates_the_evidence_is_what_it_was_bit_for_bit(rows):
    with_them, without = said(rows), said(rows, replace(PART, candidates=None))
    assert without.candidates is None
    for name in vars(without):
        if name != "candidates":
            assert torch.equal(getattr(with_them, name), getattr(without, name))


def test_evidence_with_candidates_is_cut_and_joined(rows):
    whole = said(rows)
    again = Evidence.joined([whole[:41], whole[41:42], whole[42:]])
    assert all(
        torch.equal(getattr(whole.candidates, name), getattr(again.candidates, name))
        for name in vars(whole.candidates)
    )
    chosen = whole[torch.tensor([5, 80])]
    assert torch.equal(chosen.candidates.features_NCX[1], whole.candidates.features_NCX[80])


def test_targets_that_are_none_change_nothing_before_them(rows):
    targets_BT = rows.targets_BT.clone()
    targets_BT[:, 20:] = -1
    there_N = (targets_BT >= 0).flatten()
    cut, whole = said(rows, targets_BT=targets_BT), said(rows)
    assert same(cut[there_N], whole[there_N])
    assert Gate.of(cut, hidden=4, rescoring_hidden=4)(cut[there_N]).isfinite().all()


def test_occurrences_before_a_place_as_by_hand():
    key_N = torch.randint(9, (50,), generator=torch.Generator().manual_seed(0)) * 3
    asked_MC = torch.arange(-1, 30).repeat(50, 1)
    before_MC, back_MC = Occurrences(key_N).before(asked_MC, torch.arange(50))
    for place in range(50):
        stood = [(key_N[:place] == key).nonzero()[:, 0].tolist() for key in range(-1, 30)]
        assert before_MC[place].tolist() == [len(at) for at in stood]
        assert back_MC[place].tolist() == [place - at[-1] if at else 0 for at in stood]


@pytest.mark.parametrize(
    "changes",
    [{"followers": -1}, {"nearest": -1}, {"likeliest": 0}, {"most": 0}, {"hidden": 0}, {"layers": 0}],
)
def test_what_cannot_be_is_told(changes):
    [problem] = replace(FEW, **changes).problems()
    assert next(iter(changes)) in problem
    assert not FEW.problems()
    assert not replace(FEW, followers=0).problems()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_finds_what_the_cpu_finds():
    """A vocabulary of 50,257 and rows that the text knows in part; features in 16 bits."""
    generator = torch.Generator().manual_seed(5)
    text_N = torch.randint(50_257, (100_000,), generator=generator) // 997 * 997
    tokens_BT = torch.stack([text_N[start : start + 1025] for start in (0, 5000)])
    tokens_BT[:, 500] = 0
    h_BTD, head_DV = (
        torch.randn(2, 1024, 16, generator=generator),
        torch.randn(16, 50_257, generator=generator),
    )
    part, both = Blend(candidates=Candidates(gaps=((3, 2), (4, 2, 1), (-3, -2, 1)))), []
    for device in ("cpu", "cuda"):
        rows_BT, head = tokens_BT.to(device), head_DV.to(device)
        inputs_BT = rows_BT[:, :-1]
        rows = inputs_BT, rows_BT[:, 1:], (inputs_BT == 0).cumsum(1), h_BTD.to(device)
        grams = Grams(text_N.to(device), 50_257, part.gaps(), torch.arange(50_257, device=device) % 256)
        both.append(evidence_of(part, grams, lambda h_MD, w=head: h_MD @ w, *rows, vocab_size=50_257))
    here, there = both
    assert there.candidates.features_NCX.dtype is torch.float16
    gate = Gate.of(here, hidden=8, rescoring_hidden=8)
    with torch.no_grad():
        gate.rescoring.outer.weight.normal_(generator=generator)
        one, other = gate(here), gate.cuda()(there).cpu()
    # Where logits are nearly equal the last of the likeliest may be another.
    near_N = (here.candidates.target_N == there.candidates.target_N.cpu()) & (
        here.candidates.log_NC.exp().sum(1) - there.candidates.log_NC.cpu().exp().sum(1)
    ).abs().lt(1e-5)
    assert near_N.float().mean() > 0.99
    torch.testing.assert_close(one[near_N], other[near_N], atol=0.02, rtol=0.02)
