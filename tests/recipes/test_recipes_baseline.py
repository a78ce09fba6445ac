"""The NoCap baseline, written down a second time from its specification and compared with `nocap`.

The functions here know nothing of the package: plain torch on a dict of weights, in fp64. `weights` holds
"table" (V, D) and, for layer l, "l.qkv" (3D, D), "l.out" (D, D), "l.up" (4D, D), "l.down" (D, 4D).
"""

import math
from dataclasses import replace

import pytest
import torch

from sabrage.model.counts import flops_per_token, memory_estimate, num_parameters
from sabrage.model.ends import LinearHead
from sabrage.model.lm import build_model
from sabrage.optim.groups import Optimizers
from sabrage.parts import Batch
from sabrage.plan import Plan, Trapezoid
from sabrage.precision.autocast import Fp32
from sabrage.recipes import find
from sabrage.train.loop import build_learner
from sabrage.train.step import TrainStep
from sabrage.train.world import World

LAYERS = 2
HEAD = 64


def norm(x):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def rotate(x):
    """(T, 64) queries or keys of one head."""
    time = torch.arange(len(x), dtype=x.dtype)
    frequencies = torch.tensor([10000 ** (-2 * i / HEAD) for i in range(HEAD // 2)], dtype=x.dtype)
    cos, sin = torch.cos(time[:, None] * frequencies), torch.sin(time[:, None] * frequencies)
    x1, x2 = x[:, : HEAD // 2], x[:, HEAD // 2 :]
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=1)


def attention(x, qkv, out):
    """(T, D) normalised vectors of one sequence."""
    q, k, v = (x @ qkv.T).chunk(3, dim=1)
    later = torch.ones(len(x), len(x)).triu(1).bool()
    heads = []
    for start in range(0, x.shape[1], HEAD):
        one = slice(start, start + HEAD)
        scores = rotate(q[:, one]) @ rotate(k[:, one]).T / 8
        heads.append(scores.masked_fill(later, -math.inf).softmax(1) @ v[:, one])
    return torch.cat(heads, dim=1) @ out.T


def mlp(x, up, down):
    hidden = x @ up.T
    return (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ down.T


def logits_of(weights, tokens):
    """(V,) logits at each position of one sequence."""
    x = weights["table"][tokens]
    for layer in range(LAYERS):
        x = x + attention(norm(x), weights[f"{layer}.qkv"], weights[f"{layer}.out"]) / math.sqrt(2 * LAYERS)
        x = x + mlp(norm(x), weights[f"{layer}.up"], weights[f"{layer}.down"])
    return norm(x) @ weights["table"].T


def loss_of(weights, tokens_BT, targets_BT):
    rows = zip(tokens_BT, targets_BT, strict=True)
    losses = [-logits_of(weights, x).log_softmax(1)[range(len(y)), y] for x, y in rows]
    return torch.cat(losses).mean()


def gradients_of(weights, tokens_BT, targets_BT):
    learning = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss = loss_of(learning, tokens_BT, targets_BT)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in learning.items()}


def adamw(weights, state, gradients, *, step, lr):
    """One update, in place; `step` counts from 1."""
    for name, weight in weights.items():
        mean, square = state.setdefault(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
        mean.mul_(0.9).add_(0.1 * gradients[name])
        square.mul_(0.95).add_(0.05 * gradients[name] ** 2)
        weight.mul_(1 - lr * 0.1)
        weight.sub_(lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8))


def names_in(model):
    """Parameter by the name it has here; every one of the model's."""
    blocks = dict(enumerate(model.blocks))
    named = {"table": model.embedding.weight}
    for layer, block in blocks.items():
        named |= {f"{layer}.qkv": block.mixer.qkv.weight, f"{layer}.out": block.mixer.out.weight}
        named |= {f"{layer}.up": block.feedforward.up.weight, f"{layer}.down": block.feedforward.down.weight}
    assert {id(weight) for weight in named.values()} == {id(weight) for weight in model.parameters()}
    return named


def copy_of(model):
    return {name: weight.detach().double() for name, weight in names_in(model).items()}


def small(*, dim, vocab_size):
    """`nocap` with two layers, heads of the baseline's width and another size."""
    nocap = find("nocap")
    (mixer,) = nocap.model.mixers
    model = replace(
        nocap.model,
        layers=LAYERS,
        dim=dim,
        vocab_size=vocab_size,
        mixers=(replace(mixer, heads=dim // HEAD),),
    )
    return replace(nocap, model=model, precision=Fp32())


def draw_batch(vocab_size, *, rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(("dim", "vocab_size", "length"), [(64, 500, 40), (128, 500, 63), (768, 5003, 24)])
def test_logits_loss_and_gradients_are_the_specifications(dim, vocab_size, length):
    recipe = small(dim=dim, vocab_size=vocab_size)
    learner = build_learner(recipe, World(torch.device("cpu")))
    tokens_BT, targets_BT = draw_batch(vocab_size, rows=2, length=length)
    weights = copy_of(learner.model)

    with torch.no_grad():
        logits = learner.model.logits(tokens_BT)
    expected = torch.stack([logits_of(weights, row) for row in tokens_BT])
    torch.testing.assert_close(logits, expected.float(), atol=1e-5, rtol=0)

    loss, _ = learner(tokens_BT, targets_BT, None, None)
    loss.backward()
    expected_loss, gradients = gradients_of(weights, tokens_BT, targets_BT)
    torch.testing.assert_close(loss.detach(), expected_loss.float(), atol=1e-6, rtol=0)
    for name, weight in names_in(learner.model).items():
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(
            weight.grad,
            gradients[name].float(),
            atol=1e-5 * largest,
            rtol=0,
            msg=lambda m, name=name: name + m,
        )


@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (128, 2)])
def test_five_steps_of_training_are_the_specifications(dim, heads):
    rows, length, micro, vocab_size = 6, 32, 2, 500
    plan = Plan(
        steps=5,
        lr=Trapezoid(warmup=2, warmdown=2),
        tokens_per_step=rows * length,
        sequence_length=length,
    )
    recipe = replace(small(dim=dim, vocab_size=vocab_size), plan=plan)
    assert recipe.model.mixers[0].heads == heads
    world = World(torch.device("cpu"))
    learner = build_learner(recipe, world)
    optimizers = Optimizers(recipe.optim, learner.named_parameters(), world.device)
    step = TrainStep(learner, optimizers, world, micro_tokens=micro * length, compile=False)

    weights, state = copy_of(learner.model), {}
    start = {name: weight.clone() for name, weight in weights.items()}
    for number, share in enumerate((1 / 2, 1, 1, 1, 1 / 2)):
        # Steps 0 and 1 warm up, 2 is at the peak, 3 and 4 warm down from it: 2/2 and 1/2.
        tokens_BT, targets_BT = draw_batch(vocab_size, rows=rows, length=length, seed=number)
        loss = step(Batch(tokens_BT, targets_BT), plan.at(number))
        found = [
            gradients_of(weights, tokens_BT[at : at + micro], targets_BT[at : at + micro])
            for at in range(0, rows, micro)
        ]
        mean = {name: sum(grads[name] for _, grads in found) / len(found) for name in weights}
        adamw(weights, state, mean, step=number + 1, lr=0.0018 * share)
        expected = sum(one for one, _ in found) / len(found)
        torch.testing.assert_close(loss, expected.float(), atol=2e-6, rtol=0)

    for name, weight in names_in(learner.model).items():
        far = (weight.detach().double() - weights[name]).abs()
        # AdamW divides a gradient by its own size, so where it is all rounding, so is the step.
        assert (far > 1e-5).double().mean() < 1e-4, name
        assert far.max() < 5e-5, name
        assert (weights[name] - start[name]).abs().max() > 4e-3, name


def test_the_initial_weights_are_those_of_torchs_linear_layers():
    spec = replace(find("nocap").model, layers=1)
    model = build_model(spec, seed=0)
    assert model.head.weight is model.embedding.weight
    for name, weight in names_in(model).items():
        bound = weight.shape[1] ** -0.5
        values = weight.detach().double()
        assert values.abs().max() <= bound, name
        assert values.abs().max() > 0.999 * bound, name
        # Uniform: mean 0, sd bound / sqrt 3, and as many below half the bound as above.
        assert abs(values.mean()) < 5 * bound / (3 * values.numel()) ** 0.5, name
        assert values.std() == pytest.approx(bound / 3**0.5, rel=2e-3), name
        assert (values.abs() < bound / 2).double().mean() == pytest.approx(0.5, abs=2e-3), name


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    spec = small(dim=64, vocab_size=50).model
    before = torch.get_rng_state()
    first, again, other = (build_model(spec, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_baseline_has_124_million_parameters_and_takes_0_80_gflop_a_token():
    spec, dim, length = find("nocap").model, 768, 1024
    assert num_parameters(spec) == 12 * (3 + 1 + 4 + 4) * dim**2 + 50257 * dim == 123_532_032
    linear = 12 * (3 + 1 + 4 + 4) * dim**2 + 50257 * dim
    # Of 1,024 keys a token sees (1,024 + 1) / 2 on average; each costs a product with q and one with v.
    attention = 12 * 2 * dim * (length + 1) / 2
    assert flops_per_token(spec, length) == 3 * 2 * (linear + attention)
    assert flops_per_token(spec, length) == pytest.approx(0.80e9, rel=0.01)


def test_memory_grows_with_tokens_and_layers_and_is_twice_in_activations_when_products_are_fp32():
    spec = find("nocap").model
    weights = memory_estimate(spec, 0)
    assert weights >= 16 * num_parameters(spec)
    few, many = (memory_estimate(spec, tokens) - weights for tokens in (1024, 65_536))
    assert many == 64 * few > 0
    assert memory_estimate(spec, 1024, wide=True) - memory_estimate(spec, 0, wide=True) == 2 * few
    assert memory_estimate(replace(spec, layers=6), 1024) < memory_estimate(spec, 1024)


@pytest.mark.parametrize(("name", "rows", "measured"), [("fast", 32, 29.0), ("fast-24gb", 8, 12.7)])
def test_a_head_that_holds_few_logits_takes_less_memory(name, rows, measured):
    spec, tokens = find(name).model, rows * 2048
    estimate = memory_estimate(spec, tokens)
    assert estimate == pytest.approx(measured * 2**30, rel=0.07)
    plain = replace(spec, head=LinearHead(tied=spec.head.tied))
    assert memory_estimate(plain, tokens) - estimate == (tokens - 8192) * spec.vocab_size * 4
    assert memory_estimate(plain, 4096) == memory_estimate(spec, 4096)
