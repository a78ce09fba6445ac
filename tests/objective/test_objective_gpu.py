"""The multi-token recipes on a GPU: one graph, its loss, no waiting, and the fused head over several sets."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from objectives import OBJECTIVES, Pieces, weighted
from torch._dynamo.utils import counters

from sabrage.config import leaves, override, resolve
from sabrage.model.ends import LinearHead
from sabrage.model.fused_head import FusedHead
from sabrage.objective.next_token import NextToken
from sabrage.optim.groups import Optimizers
from sabrage.parts import Batch
from sabrage.recipes import find
from sabrage.recipes.multi_token import multi_token
from sabrage.run.device import probe
from sabrage.train.loop import build_learner
from sabrage.train.step import TrainStep
from sabrage.train.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = [recipe.name for recipe in multi_token]
HEADS = {"linear": LinearHead(), "fused": FusedHead()}
ROWS, LENGTH, VOCABULARY = 4, 256, 512


def small(recipe, head):
    """The recipe with two layers of width 256 and few tokens, as it would run on this GPU."""
    for path, _ in leaves(recipe):
        if path.endswith(".heads"):
            recipe = override(recipe, f"{path}=4")
    model = replace(recipe.model, layers=2, dim=256, vocab_size=VOCABULARY, head=head)
    plan = replace(recipe.plan, tokens_per_step=ROWS * LENGTH, sequence_length=LENGTH)
    return resolve(replace(recipe, model=model, plan=plan), probe("cuda"))


def learner_of(recipe):
    """The learner on the GPU with noise on all weights, so that nothing hides behind a zero."""
    learner = build_learner(recipe, World(torch.device("cuda")))
    recipe.objective.read(learner.objective, Pieces())
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for weight in learner.parameters():
            weight += torch.randn(weight.shape, generator=generator, device="cuda") * weight.shape[-1] ** -0.5
    return learner


def batch(seed=0, *, documents=False):
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens_BT = torch.randint(256, (ROWS, LENGTH + 1), generator=generator, device="cuda")
    borders_BT = torch.rand(ROWS, LENGTH, generator=generator, device="cuda") < 0.02
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], borders_BT.cumsum(1) if documents else None)


def error(found, exact):
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_forward_pass_is_one_graph_with_the_eager_loss(name, head, documents):
    recipe = small(find(name), head)
    learner = learner_of(recipe)
    torch._dynamo.reset()
    # fullgraph makes a graph break an error.
    compiled = torch.compile(learner, fullgraph=True, dynamic=False)
    before = counters["stats"]["unique_graphs"]
    for seed, step in enumerate((0, 150, 359)):
        given, weights = batch(seed, documents=documents), recipe.plan.at(step).loss_weights
        losses, gradients = [], []
        for forward in (learner, compiled):
            arguments = (given.tokens_BT, given.targets_BT, given.documents_BT)
            loss, parts = forward(*arguments, torch.tensor(weights, device="cuda"))
            loss.backward()
            losses.append(torch.stack([loss, *parts.values()]).detach())
            gradients.append(learner.model.embedding.weight.grad)
            learner.zero_grad()
        torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
        assert error(gradients[1], gradients[0]) < 0.03
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("head", [FusedHead(), FusedHead(columns=384)], ids=["whole", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_learns_and_never_waits_for_the_device(name, head):
    recipe = small(find(name), head)
    torch._dynamo.reset()
    world = World(torch.device("cuda"))
    learner = build_learner(recipe, world)
    recipe.objective.read(learner.objective, Pieces())
    optimizers = Optimizers(recipe.optim, learner.named_parameters(), world.device)
    step = TrainStep(learner, optimizers, world, micro_tokens=2 * LENGTH, compile=True)
    given = batch()
    losses = [step(given, recipe.plan.at(number)) for number in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [step(given, recipe.plan.at(20 + number)) for number in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, *_, last = torch.stack(losses).tolist()
    assert last < first - 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fused_head_scores_several_sets_as_the_plain_head_does(tiny, name):
    found = []
    for head in HEADS.values():
        bf16 = replace(tiny, precision=find("base").precision)
        recipe = resolve(
            weighted(replace(bf16, model=replace(tiny.model, head=head)), OBJECTIVES[name]), probe("cuda")
        )
        learner, given = learner_of(recipe), batch(documents=True)
        weights_W = torch.tensor(recipe.plan.at(0).loss_weights, device="cuda")
        loss, parts = learner(given.tokens_BT, given.targets_BT, given.documents_BT, weights_W)
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in learner.named_parameters()}
        found.append((torch.stack([loss, *parts.values()]).detach(), gradients))
    (plain, expected), (fused, own) = found
    torch.testing.assert_close(fused, plain, rtol=5e-3, atol=0)
    assert own.keys() == expected.keys()
    assert all(error(own[key], gradient) < 0.05 for key, gradient in expected.items())


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_without_further_weights_the_head_computes_the_next_token_bit_for_bit(head):
    part = resolve(head, probe("cuda"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = part.build(dim=256, vocab_size=VOCABULARY).cuda()
    model, found = SimpleNamespace(head=module), []
    for objective, weights in ((NextToken(), None), (OBJECTIVES["shared"], (1.0, 0.0, 0.0))):
        h_BTD = torch.randn(
            ROWS, LENGTH, 256, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
        )
        h_BTD.requires_grad_()
        scorer = objective.build(dim=256, vocab_size=VOCABULARY)
        weights_W = torch.tensor(weights, device="cuda") if weights else None
        with torch.autocast("cuda", torch.bfloat16):
            loss = scorer(h_BTD, batch(documents=True), model, weights_W).total
        loss.backward()
        found.append((loss.detach(), h_BTD.grad, module.weight.grad))
        module.weight.grad = None
    assert all(torch.equal(own, plain) for plain, own in zip(*found, strict=True))
