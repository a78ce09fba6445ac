"""Paired heads: the formula entry by entry, who sees whom, windows in tokens."""

import pytest
import torch
from attention_cases import two_layers_with_flex

from sabrage.attention.multi_head import MultiHead
from sabrage.attention.paired import attend_paired
from sabrage.context import Context


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sees(query, key, window):
    """Whether one (token, head) sees another; of a pair the first head is 0 and the second 1."""
    (t, late), (s, later) = query, key
    distance = 2 * (t - s) + late - later
    return distance >= 0 and (window is None or distance <= 2 * window - 2)


def naive(q_BTHK, k_BSGK, v_BSGK, window=None, documents=None):
    """One softmax for each query, over the tokens and the two heads of its pair."""
    batch, length, heads, width = q_BTHK.shape
    groups, half, out = k_BSGK.shape[2], heads // 2, torch.zeros_like(q_BTHK)
    for b in range(batch):
        for h in range(heads):
            # Heads h and h + H / 2 read what they would alone, and each what the other reads.
            first = h % half // (heads // groups)
            own, pair = h // half, (first, first + groups // 2)
            for t in range(length):
                seen = [
                    (s, pair[later])
                    for s in range(length)
                    for later in range(2)
                    if sees((t, own), (s, later), window) and (not documents or documents[t] == documents[s])
                ]
                keys = torch.stack([k_BSGK[b, s, g] for s, g in seen])
                values = torch.stack([v_BSGK[b, s, g] for s, g in seen])
                weights = (keys @ q_BTHK[b, t, h] * width**-0.5).softmax(0)
                out[b, t, h] = weights @ values
    return out


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("documents", [None, [0, 0, 0, 1, 1, 2, 2]])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("groups", [4, 2])
def test_pairs_are_their_formula(groups, window, documents, backend):
    q, k, v = draw(2, 7, 4, 6), draw(2, 7, groups, 6, seed=1), draw(2, 7, groups, 6, seed=2)
    context = Context(documents_BT=torch.tensor([documents, documents]) if documents else None)
    found = attend_paired(q, k, v, context, backend=backend, window=window)
    torch.testing.assert_close(found, naive(q, k, v, window, documents), atol=1e-6, rtol=1e-5)


def test_at_its_own_token_the_second_head_sees_the_first_and_the_first_not_the_second():
    q, k, v = (draw(1, 3, 2, 4, seed=seed) for seed in range(3))
    before = attend_paired(q, k, v, Context(), backend="plain", window=None)
    for changed, moved in ((0, [True, True]), (1, [False, True])):
        other_v = v.clone()
        other_v[:, 1, changed] += 1
        after = attend_paired(q, k, other_v, Context(), backend="plain", window=None)
        assert (after != before).any(-1)[0].tolist() == [[False, False], moved, [True, True]]


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_is_in_tokens_and_nothing_beyond_it_is_seen(window):
    mixer = MultiHead(heads=2, paired=True, window=window).build(dim=16, layer=0)
    x_BTD = draw(1, 12, 16)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 3] += 1
    moved = (mixer(x_BTD, Context()) != mixer(changed_BTD, Context())).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * window + [False] * (9 - window)


def test_a_share_of_the_plans_window_is_one_too():
    x_BTD = draw(1, 200, 16)
    outputs = []
    for window in ({"window": 64}, {"window_share": 0.5}):
        torch.manual_seed(0)
        mixer = MultiHead(heads=2, paired=True, **window).build(dim=16, layer=0)
        outputs.append(mixer(x_BTD, Context(window=128)))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_layers_with_flex_are_one_graph_that_makes_the_mask_of_pairs_once():
    part = MultiHead(heads=4, kv_heads=2, paired=True, window=40)
    found, expected, graphs = two_layers_with_flex(part, draw(2, 217, 32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    code = graphs[0].code
    assert code.count("flex_attention(") == 2
    assert code.count("sabrage.document_blocks") == 1
    assert code.count("argsort(") == 2, "the transposes of the lists of blocks seen in part and as a whole"
