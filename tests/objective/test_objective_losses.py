"""What objectives with several targets compute: their specification, their neutral setting, micro-batches."""

from dataclasses import replace

import pytest
import torch
from objectives import OBJECTIVES, Pieces, weighted

from sabrage.data.tokenizer import ByteTokenizer
from sabrage.model.ends import LinearHead
from sabrage.model.fused_head import FusedHead
from sabrage.objective.next_token import NextToken
from sabrage.objective.prefix import PrefixTarget, longest_prefixes
from sabrage.objective.targets import ahead
from sabrage.parts import Batch, DataError, Knobs
from sabrage.train.loop import build_learner
from sabrage.train.step import TrainStep
from sabrage.train.world import World

CPU = World(torch.device("cpu"))


def batch(*, rows=3, length=32, documents=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(256, (rows, length + 1), generator=generator)
    borders_BT = torch.rand(rows, length, generator=generator) < 0.2
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], borders_BT.cumsum(1) if documents else None)


def learner_of(recipe, *, tokenizer=None):
    """The learner with noise on all weights, the table of prefixes computed."""
    learner = build_learner(recipe, CPU)
    recipe.objective.read(learner.objective, tokenizer or Pieces())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in learner.parameters():
            weight += torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
    return learner


def loss_and_gradients(learner, given, weights):
    loss, _ = learner(given.tokens_BT, given.targets_BT, given.documents_BT, weights)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in learner.model.named_parameters()}


def with_head(tiny, head):
    return replace(tiny, model=replace(tiny.model, head=head))


HEADS = {"linear": LinearHead(), "untied": LinearHead(tied=False), "fused": FusedHead(backend="plain")}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_further_weights_loss_and_gradients_are_those_of_the_next_token(tiny, one_thread, name, head):
    tiny, part, given = with_head(tiny, head), OBJECTIVES[name], batch()
    plain = loss_and_gradients(learner_of(replace(tiny, objective=NextToken())), given, None)
    weights_W = torch.zeros(part.num_weights())
    weights_W[0] = 1
    own = loss_and_gradients(learner_of(weighted(tiny, part)), given, weights_W)
    assert torch.equal(own[0], plain[0])
    assert all(torch.equal(own[1][key], gradient) for key, gradient in plain[1].items())


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter runs kernels on machines without a GPU"
)
@pytest.mark.parametrize("name", ["shared", "prefix"])
def test_the_fused_kernel_scores_several_sets_as_the_plain_head_does(tiny, one_thread, name):
    pytest.importorskip("triton")
    part, given = OBJECTIVES[name], batch(rows=1, documents=True)
    fused, next_token = FusedHead(backend="triton"), replace(tiny, objective=NextToken())
    weights_W = torch.tensor([1.0, 0.5, 0.25][: part.num_weights()])
    plain = loss_and_gradients(learner_of(weighted(tiny, part)), given, weights_W)
    own = loss_and_gradients(learner_of(weighted(with_head(tiny, fused), part)), given, weights_W)
    torch.testing.assert_close(own[0], plain[0], rtol=1e-5, atol=0)
    for key, gradient in plain[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(own[1][key], gradient, rtol=1e-3, atol=1e-5 * scale, msg=key)
    neutral_W = (torch.arange(part.num_weights()) == 0).float()
    neutral = loss_and_gradients(learner_of(weighted(with_head(tiny, fused), part)), given, neutral_W)
    expected = loss_and_gradients(learner_of(with_head(next_token, fused)), given, None)
    assert torch.equal(neutral[0], expected[0])
    assert all(torch.equal(neutral[1][key], gradient) for key, gradient in expected[1].items())


def specified(learner, given, name, weights):
    """The total of an objective with one hidden state, token by token in fp64."""
    targets = {distance: ahead(given, distance) for distance in (1, 2, 3)}
    if name == "prefix":
        table = longest_prefixes([Pieces().decode_bytes([v]) for v in range(256)])
        prefixes = [[table[v] for v in row] for row in given.targets_BT.tolist()]
        targets = {1: given.targets_BT, 2: torch.tensor(prefixes)}
    log_BTV = learner.model.logits(given.tokens_BT).double().log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for weight, targets_BT in zip(weights, targets.values(), strict=True):
        for row, t in (targets_BT >= 0).nonzero().tolist():
            total = total - weight * log_BTV[row, t, targets_BT[row, t]] / given.targets_BT.numel()
    return total


@pytest.mark.parametrize("name", ["shared", "prefix"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_one_pass_over_several_sets_is_the_sum_over_targets(tiny, one_thread, name, head):
    recipe = weighted(with_head(tiny, head), OBJECTIVES[name])
    learner, given = learner_of(recipe), batch()
    weights = [1.0, 0.5, 0.25][: OBJECTIVES[name].num_weights()]
    loss, gradients = loss_and_gradients(learner, given, torch.tensor(weights))
    learner.zero_grad()
    total = specified(learner, given, name, weights)
    total.backward()
    torch.testing.assert_close(loss.double(), total.detach(), rtol=1e-6, atol=0)
    for key, parameter in learner.model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_part_of_the_loss_is_told_and_weighted(tiny, one_thread, name):
    part, given = OBJECTIVES[name], batch()
    learner = learner_of(weighted(tiny, part))
    weights = [2.0**-index for index in range(part.num_weights())]
    with torch.no_grad():
        loss, parts = learner(given.tokens_BT, given.targets_BT, None, torch.tensor(weights))
    counts = [given.targets_BT.numel()] * 3
    if name == "prefix":
        counts[1] = int((given.targets_BT >= 26).sum())
    else:
        counts = [3 * (32 - index) for index in range(3)]
    means = [float(mean) * count / counts[0] for mean, count in zip(parts.values(), counts, strict=False)]
    assert len(parts) == part.num_weights()
    assert float(loss) == pytest.approx(
        sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    )


class Keep:
    """Optimizers that keep the gradients and move nothing."""

    def __init__(self, learner):
        self.learner = learner

    def step(self, knobs, **options):
        self.gradients = {name: p.grad.clone() for name, p in self.learner.named_parameters()}

    def zero_grad(self):
        self.learner.zero_grad()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_with_fewer_and_more_targets_add_up_to_the_whole(tiny, one_thread, name):
    part = OBJECTIVES[name]
    given = batch(rows=6, documents=True)
    weights = tuple(2.0**-index for index in range(part.num_weights()))
    knobs = Knobs(step=0, lr=1.0, sequence_length=32, tokens_per_step=192, loss_weights=weights)
    found = []
    for rows in (1, 2, 6):
        learner = learner_of(weighted(tiny, part))
        step = TrainStep(learner, Keep(learner), CPU, micro_tokens=rows * 32, compile=False)
        found.append((step(given, knobs), step.optimizers.gradients))
    *pieces, (whole, gradients) = found
    for loss, own in pieces:
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        for key, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(own[key], gradient, rtol=1e-4, atol=1e-5 * scale, msg=key)


def test_the_longest_prefix_is_the_longest_other_token_that_begins_a_token():
    pieces = [b"h", b"he", b"hell", b"hello", b"e", b"", b"lo", b"hex", b"x"]
    assert longest_prefixes(pieces) == [-1, 0, 1, 2, -1, -1, -1, 1, -1]


def test_the_end_of_text_has_no_prefix_and_is_none():
    module = PrefixTarget().build(dim=8, vocab_size=260)
    PrefixTarget().read(module, Pieces())
    assert module.prefix_V[:52].tolist() == [*[-1] * 26, *range(26)]
    assert module.prefix_V[256:].tolist() == [-1] * 4
    assert 256 not in module.prefix_V


def test_bytes_have_no_prefixes_and_the_term_is_exactly_zero(tiny, one_thread):
    given = batch()
    plain = loss_and_gradients(learner_of(replace(tiny, objective=NextToken())), given, None)
    learner = learner_of(weighted(tiny, PrefixTarget()), tokenizer=ByteTokenizer())
    own = loss_and_gradients(learner, given, torch.tensor([1.0, 0.7]))
    assert torch.equal(own[0], plain[0])
    assert all(torch.equal(own[1][key], gradient) for key, gradient in plain[1].items())


def test_prefixes_of_a_vocabulary_that_nobody_knows_are_refused(tiny, run_recipe):
    with pytest.raises(DataError, match="PrefixTarget needs the bytes of every token"):
        run_recipe(weighted(tiny, PrefixTarget()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_validation_uses_nothing_of_the_objective(tiny, assemble, name):
    session, _, evaluator = assemble(weighted(tiny, OBJECTIVES[name]))
    before = evaluator()
    with torch.no_grad():
        for parameter in session.learner.objective.parameters():
            parameter.fill_(7)
    assert evaluator() == before == assemble(tiny)[2]()


class CountGraphs:
    """A torch.compile backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_forward_pass_is_one_graph_whatever_the_weights(tiny, one_thread, name, documents):
    part, counting = OBJECTIVES[name], CountGraphs()
    torch._dynamo.reset()
    learner = learner_of(weighted(tiny, part))
    compiled = torch.compile(learner, fullgraph=True, dynamic=False, backend=counting)
    for seed in range(3):
        given = batch(documents=documents, seed=seed)
        weights = torch.tensor([1.0, 0.5 * seed, 0.1 * seed][: part.num_weights()])
        arguments = (given.tokens_BT, given.targets_BT, given.documents_BT, weights)
        torch.testing.assert_close(compiled(*arguments)[0], learner(*arguments)[0], rtol=1e-6, atol=0)
    assert counting.graphs == 1
    torch._dynamo.reset()
