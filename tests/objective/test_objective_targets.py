"""Which tokens each objective scores where, proven on sequences that count."""

from types import SimpleNamespace

import pytest
import torch
from objectives import OBJECTIVES

from sabrage.objective.targets import ahead, shares
from sabrage.parts import Batch

LENGTH = 12
# Row b counts from 20 b: token t is 20 b + t, so that the token k after it is 20 b + t + k.
COUNTING_BT = 20 * torch.arange(3)[:, None] + torch.arange(LENGTH + 1)
BATCH = Batch(COUNTING_BT[:, :-1], COUNTING_BT[:, 1:])
# Documents of 5, 1, 4 and 2 tokens in every row.
DOCUMENTS_BT = torch.tensor([0] * 5 + [1] + [2] * 4 + [3] * 2).expand(3, -1)


def expected(row, t, distance, documents_T=None):
    """The target of token t in a row, said token by token."""
    if t + distance > LENGTH:
        return -1
    if documents_T is not None and documents_T[t + distance - 1] != documents_T[t]:
        return -1
    return 20 * row + t + distance


@pytest.mark.parametrize("distance", [1, 2, 3, LENGTH, LENGTH + 1, LENGTH + 5])
def test_the_target_k_ahead_is_the_token_k_later_or_none_beyond_the_row(distance):
    found = ahead(BATCH, distance).tolist()
    assert found == [[expected(row, t, distance) for t in range(LENGTH)] for row in range(3)]


@pytest.mark.parametrize("distance", [1, 2, 3, 5, 6])
def test_no_target_lies_behind_the_token_that_follows_its_document(distance):
    batch = Batch(BATCH.tokens_BT, BATCH.targets_BT, DOCUMENTS_BT)
    documents_T = DOCUMENTS_BT[0].tolist()
    found = ahead(batch, distance).tolist()
    assert found == [[expected(row, t, distance, documents_T) for t in range(LENGTH)] for row in range(3)]


def test_shares_count_targets_for_every_next_token():
    targets_BTW = torch.stack([ahead(BATCH, distance) for distance in (1, 2, 5)], dim=-1)
    assert shares(targets_BTW).tolist() == pytest.approx([1, 11 / 12, 8 / 12], rel=1e-6)
    assert shares(targets_BTW)[0] == 1
    assert shares(torch.full((2, 4, 2), -1)).tolist() == [0, 0]


class Recording:
    """A head and an embedding that note what they are given."""

    def __init__(self, dim):
        self.dim, self.targets, self.embedded = dim, [], []

    def losses(self, h_BTD, targets_BTW, weights_W):
        self.targets += targets_BTW.unbind(-1)
        return h_BTD.sum() * 0, weights_W

    def embed(self, tokens_BT, context):
        self.embedded.append(tokens_BT)
        return torch.zeros(*tokens_BT.shape, self.dim)


@pytest.mark.parametrize("name", ["shared", "heads", "heads-mixed", "sequential"])
@pytest.mark.parametrize("documents_BT", [None, DOCUMENTS_BT], ids=["one document", "documents"])
def test_set_k_of_an_objective_is_the_token_k_ahead(name, documents_BT):
    part = OBJECTIVES[name]
    record = Recording(16)
    model = SimpleNamespace(head=record, embedding=record.embed)
    batch = Batch(BATCH.tokens_BT, BATCH.targets_BT, documents_BT)
    module = part.build(dim=16, vocab_size=100)
    module(torch.randn(3, LENGTH, 16), batch, model, torch.ones(part.num_weights()))
    assert len(record.targets) == part.num_weights()
    for index, targets_BT in enumerate(record.targets):
        assert torch.equal(targets_BT, ahead(batch, 1 + index)), f"set {index}"


def test_a_sequential_module_reads_the_true_tokens_before_the_one_it_predicts():
    part, record = OBJECTIVES["sequential"], Recording(16)
    model = SimpleNamespace(head=record, embedding=record.embed)
    module = part.build(dim=16, vocab_size=100)
    module(torch.randn(3, LENGTH, 16), BATCH, model, torch.ones(3))
    for index, tokens_BT in enumerate(record.embedded):
        scored_BT = record.targets[1 + index] >= 0
        assert torch.equal(tokens_BT[scored_BT] + 1, record.targets[1 + index][scored_BT])
        assert torch.equal(tokens_BT[scored_BT], (BATCH.tokens_BT + 1 + index)[scored_BT])


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sequential_module_sees_no_token_that_it_predicts(tiny, one_thread, depth):
    from sabrage.model.lm import build_model

    part = OBJECTIVES["sequential"]
    model = build_model(tiny.model, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = part.build(dim=tiny.model.dim, vocab_size=257)
    record = Recording(tiny.model.dim)
    hidden = []
    record.losses = lambda h_BTD, targets_BTW, weights_W: (hidden.append(h_BTD) or h_BTD.sum(), weights_W)
    fake = SimpleNamespace(head=record, embedding=model.embedding)

    def states(tokens_BT):
        hidden.clear()
        batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
        with torch.no_grad():
            module(model(batch.tokens_BT), batch, fake, torch.ones(3))
        return hidden[depth]

    before = states(COUNTING_BT)
    for t in (3, 7, LENGTH):
        other_BT = COUNTING_BT.clone()
        other_BT[:, t] = 255
        after = states(other_BT)
        # Position i predicts token i + depth + 1 and may see all tokens before that one.
        assert torch.equal(after[:, : t - depth], before[:, : t - depth])
        assert not torch.equal(after[:, t - depth], before[:, t - depth])
