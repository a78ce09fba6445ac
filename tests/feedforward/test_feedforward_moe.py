"""Mixtures of experts: the sorted form against the specification, sizes, counts, optimizers and graphs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contracts import build, shrink
from torch._dynamo.testing import CompileCounterWithBackend

from sabrage.config import resolve
from sabrage.context import Context
from sabrage.feedforward.mlp import Mlp
from sabrage.feedforward.moe import Experts, MixtureOfExperts, Permutation
from sabrage.feedforward.routing import Gate
from sabrage.kernels.grouped_product import grouped_product_reference
from sabrage.model.counts import flops_per_token, num_active, num_parameters
from sabrage.precision.autocast import Bf16
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts

CPU = DeviceFacts(kind="cpu", name="a CPU", memory=1 << 30)
HOPPER = DeviceFacts(kind="cuda", name="a card", memory=80 << 30, capability=(9, 0), triton="3.6")
DIM = 16


def make(**changes):
    """Experts of width 16 with noise on all weights, the same at every call."""
    part = MixtureOfExperts(**({"experts": 5, "expansion": 1.5} | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = part.build(dim=DIM, layer=0)
        with torch.no_grad():
            module.router.bias.normal_(std=0.1)
    return module


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(module, x_BTD):
    """The output, and the gradients of input, gate and all experts, where the output is pulled back."""
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = module.eval()(x_BTD, Context())
    learning = {"x": x_BTD, **{name: p for name, p in module.named_parameters() if name != "router.bias"}}
    gradients = torch.autograd.grad((y_BTD * draw(*y_BTD.shape, seed=2)).sum(), list(learning.values()))
    return {"y": y_BTD.detach(), **dict(zip(learning, gradients, strict=True))}


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"active": 3}, {"active": 2, "gate": Gate(scores="sigmoid")}, {"shared": 1}, {"experts": 16}],
    ids=str,
)
def test_sorted_tokens_give_what_every_expert_on_every_token_gives(backend, changes):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    wanted = outputs_and_gradients(make(**changes), draw(2, 21, DIM))
    found = outputs_and_gradients(make(**changes, backend=backend), draw(2, 21, DIM))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_an_expert_that_no_token_chooses_gets_a_gradient_of_zero():
    module = make(backend="grouped_mm")
    with torch.no_grad():
        module.router.bias[2] = -10.0
    found = outputs_and_gradients(module, draw(2, 21, DIM))
    assert not found["up_weight"][2].any()
    assert not found["down_weight"][2].any()
    assert found["up_weight"][3].any()


def test_experts_that_are_all_alike_and_all_active_are_one_perceptron():
    module, plain = make(active=5, expansion=2.0), Mlp(expansion=2, activation="relu_squared")
    perceptron = plain.build(dim=DIM, layer=0)
    with torch.no_grad():
        module.up_weight[:], module.down_weight[:] = perceptron.up.weight, perceptron.down.weight
    x_BTD = draw(2, 9, DIM)
    torch.testing.assert_close(module(x_BTD, Context()), perceptron(x_BTD, Context()))


def test_the_weight_of_a_single_choice_is_its_score():
    module = make()
    x_BTD = draw(1, 30, DIM)
    experts_NA, weights_NA, load_E = module.router(x_BTD, Context())
    scores_NE = F.linear(x_BTD[0], module.router.weight).softmax(-1)
    torch.testing.assert_close(weights_NA, scores_NE.gather(1, experts_NA))
    assert torch.equal(load_E, experts_NA.flatten().bincount(minlength=5))


def test_a_permutation_is_its_inverse_going_back():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    x = draw(10, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Permutation.apply(x, order, order.argsort()), x)
    assert torch.equal(Permutation.apply(x, order, order.argsort()), x[order])


def test_a_fresh_expert_is_drawn_like_a_fresh_perceptron():
    part = MixtureOfExperts(experts=4, zero_init=True)
    torch.manual_seed(0)
    module = part.build(dim=64, layer=0)
    plain = Mlp(activation="relu_squared").build(dim=64, layer=0)
    assert not module.down_weight.any()
    wanted_FD = plain.up.weight.detach()
    for expert_FD in module.up_weight.detach():
        assert expert_FD.abs().max().item() == pytest.approx(wanted_FD.abs().max().item(), rel=1e-3)
        assert expert_FD.std().item() == pytest.approx(wanted_FD.std().item(), rel=0.03)


@pytest.mark.parametrize(
    ("facts", "products", "backend"),
    [
        (CPU, "fp32", "dense"),
        (HOPPER, "bf16", "grouped_mm"),
        (HOPPER, "fp32", "triton"),
        (replace(HOPPER, capability=(8, 6)), "bf16", "triton"),
        (replace(HOPPER, capability=(12, 0)), "bf16", "triton"),
        (replace(HOPPER, capability=(7, 5)), "fp16", "dense"),
    ],
)
def test_the_device_and_the_format_choose_the_product(facts, products, backend):
    assert MixtureOfExperts().resolve(replace(facts, products=products)).backend == backend


def test_a_product_that_would_wait_for_the_host_is_refused_with_the_remedy():
    part = MixtureOfExperts(backend="grouped_mm")
    ampere = replace(HOPPER, capability=(8, 0), products="bf16")
    assert "use backend 'auto'" in part.refusal(ampere)
    assert part.refusal(replace(HOPPER, products="bf16")) is None
    assert "Triton" in MixtureOfExperts(backend="triton").refusal(CPU)


def test_wrong_sizes_are_told_with_what_is_allowed():
    part = MixtureOfExperts(experts=65, active=0, expansion=0.0, shared=-1, gate=Gate(z_loss=-1.0))
    told = "\n".join([*part.problems(), *part.gate.problems()])
    for words in ("2 to 64", "1 to experts", "above 0", "shared=-1", "gate.z_loss=-1.0"):
        assert words in told
    with pytest.raises(ValueError, match="multiples of 8: change one of the two"):
        MixtureOfExperts(expansion=0.3).build(dim=64, layer=0)


@pytest.mark.parametrize("name", ["moe-2", "moe-2-context", "moe-8", "moe-8-shared"])
def test_a_token_costs_what_it_costs_in_the_study_base_but_for_the_gate(name):
    spec, base = find(name).model, find("base").model
    gates = spec.layers * spec.dim * spec.feedforwards[0].experts
    assert flops_per_token(spec, 1024) == flops_per_token(base, 1024) + 3 * 2 * gates
    biases = spec.layers * spec.feedforwards[0].experts
    assert num_active(spec) == num_parameters(base) + gates + biases


def test_the_parameters_of_idle_experts_are_counted_in_all_and_not_as_active():
    spec = find("moe-8").model
    one = 2 * 768 * 3072
    assert num_parameters(spec) - num_active(spec) == 12 * 7 * one


def test_muon_takes_each_expert_as_a_matrix_and_leaves_the_gate_alone(assemble):
    session, _, _ = assemble(shrink(find("moe-8")))
    taken = {
        type(member.part).__name__: [name for name, _ in member.parameters]
        for member in session.optimizers.members
    }
    muon = next(m for m in session.optimizers.members if type(m.part).__name__ == "Muon").optimizer
    # Two layers of eight experts, 64 wide outside and 256 inside.
    assert {tuple(batch.momentum_SMN.shape) for batch in muon.batches} >= {(16, 256, 64), (16, 64, 256)}
    assert all(name.endswith("router.bias") for name in taken["SignDescent"])
    assert not any("router" in name for name in taken["Muon"])


def test_training_compiles_to_one_graph(assemble):
    torch._dynamo.reset()
    recipe = shrink(find("moe-8-shared"))
    spec = replace(recipe.model, feedforwards=(replace(recipe.model.feedforwards[0], backend="grouped_mm"),))
    # The compiler takes torch's grouped product for bf16 alone.
    session, _, _ = assemble(replace(recipe, model=replace(spec, layers=1), precision=Bf16()))
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(session.learner, backend=graphs, fullgraph=True, dynamic=False)
    tokens_BT = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    total, parts = step(tokens_BT, tokens_BT.roll(-1, 1), None, None)
    plain, _ = session.learner(tokens_BT, tokens_BT.roll(-1, 1), None, None)
    total.backward()
    assert graphs.frame_count == 1
    assert {"balance", "router_z", "router_entropy", "load_entropy"} <= parts.keys()
    torch.testing.assert_close(total, plain, atol=0, rtol=1e-3)
    torch._dynamo.reset()


def test_the_log_tells_how_sure_and_how_even_the_routers_are(run_recipe, tiny):
    part = MixtureOfExperts(experts=4, gate=Gate(balance_loss=0.01))
    model = replace(tiny.model, feedforwards=(part,))
    outcome, run = run_recipe(replace(tiny, model=model))
    speeds = run.events("speed")
    assert outcome.ending == "done"
    assert all(0 < record["router_entropy"] <= 1 and 0 < record["load_entropy"] <= 1 for record in speeds)
    # Two layers.
    assert all(0.019 < record["balance"] < 0.08 for record in speeds)
    idle = 2 * 3 * (2 * 32 * 128)
    assert run.manifest["parameters"] - run.manifest["active_parameters"] == idle


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_card(backend, *, seed=0):
    """Eight experts of a GPT-2 layer on the card, and 4,096 tokens."""
    torch.manual_seed(seed)
    module = MixtureOfExperts(backend=backend).build(dim=768, layer=0).cuda().eval()
    return module, draw(4, 1024, 768).cuda()


def gradients_on_card(module: Experts, x_BTD):
    x_BTD = x_BTD.clone().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y_BTD = module(x_BTD, Context())
    generator = torch.Generator("cuda").manual_seed(3)
    pull = torch.randn(y_BTD.shape, generator=generator, device="cuda")
    learning = [x_BTD, module.router.weight, module.up_weight, module.down_weight]
    return [y_BTD.detach(), *torch.autograd.grad((y_BTD * pull).sum(), learning)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_on_the_card_sorted_tokens_err_as_little_as_the_specification(backend):
    if backend == "grouped_mm" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped product is a loop on this card")
    module, x_BTD = on_card("dense")
    plain = gradients_on_card(module, x_BTD)
    other = MixtureOfExperts(backend=backend).build(dim=768, layer=0).cuda().eval()
    other.load_state_dict(module.state_dict())
    found = gradients_on_card(other, x_BTD)
    exact = module.double()
    x_BTD = x_BTD.double().requires_grad_()
    y_BTD = exact(x_BTD, Context())
    pull = torch.randn(y_BTD.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    learning = [x_BTD, exact.router.weight, exact.up_weight, exact.down_weight]
    truth = [y_BTD.detach(), *torch.autograd.grad((y_BTD * pull).sum(), learning)]
    for one, specification, right in zip(found, plain, truth, strict=True):
        error = (one.double() - right.double()).norm() / right.double().norm()
        allowed = (specification.double() - right.double()).norm() / right.double().norm()
        assert error <= 2 * allowed + 1e-6


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("recipe", ["moe-8", "moe-2-context", "moe-8-shared"])
def test_on_the_card_a_layer_is_one_graph_and_never_waits(recipe):
    facts = replace(HOPPER, capability=torch.cuda.get_device_capability(), products="bf16")
    (part,) = resolve(find(recipe).model.feedforwards, facts)
    module = part.build(dim=768, layer=0).cuda()

    def forward(x_BTD):
        context = Context()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y_BTD = module(x_BTD, context)
        return y_BTD.square().mean() + sum(context.losses.values())

    compiled = torch.compile(forward, fullgraph=True, dynamic=False)
    x_BTD = draw(4, 1024, 768).cuda().requires_grad_()
    compiled(x_BTD).backward()
    torch.testing.assert_close(compiled(x_BTD), forward(x_BTD), atol=1e-3, rtol=1e-2)
    for function in (forward, compiled):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(x_BTD).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_whole_model_computes_the_same_sorted_as_by_the_specification():
    recipe = shrink(find("moe-8-shared"))
    dense = build(recipe.model)
    part = replace(recipe.model.feedforwards[0], backend="grouped_mm")
    sorted_model = build(replace(recipe.model, feedforwards=(part,)))
    tokens_BT = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sorted_model.logits(tokens_BT), dense.logits(tokens_BT), atol=1e-4, rtol=1e-4)


def test_groups_of_rows_meet_their_own_matrix():
    x_MD, weight_EOD = draw(6, 8), draw(3, 4, 8)
    ends_E = torch.tensor([2, 2, 6], dtype=torch.int32)
    y_MO = grouped_product_reference(x_MD, weight_EOD, ends_E)
    torch.testing.assert_close(y_MO, torch.cat([x_MD[:2] @ weight_EOD[0].T, x_MD[2:] @ weight_EOD[2].T]))
