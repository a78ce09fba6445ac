from dataclasses import replace

import pytest
import torch

from sabrage.config import ConfigError, override, resolve
from sabrage.feedforward.fused_mlp import FusedMlp
from sabrage.feedforward.mlp import Mlp
from sabrage.generate.text import load_model
from sabrage.model.counts import flops_per_token
from sabrage.model.ends import LinearHead
from sabrage.model.fused_head import FusedHead
from sabrage.model.lm import LM, build_model
from sabrage.precision.fp8 import Fp8
from sabrage.precision.fp16 import Fp16
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts
from sabrage.wiring.fused_residual import FusedResidual
from sabrage.wiring.residual import Residual

CPU = DeviceFacts(kind="cpu", name="a processor", memory=0)
AMPERE = DeviceFacts(kind="cuda", name="a card", memory=0, capability=(8, 6), triton="3.6.0")
ADA = replace(AMPERE, capability=(8, 9))


def small(**changes):
    spec = replace(
        find("base").model,
        layers=2,
        dim=64,
        vocab_size=130,
        mixers=(replace(find("base").model.mixers[0], heads=2),),
    )
    return replace(spec, **{"feedforwards": (Mlp(activation="relu_squared"),), **changes})


def loss_and_gradients(model: LM, *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(130, (2, 17), generator=generator)
    loss = model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


FUSED = [
    ("head", LinearHead(), FusedHead),
    ("feedforwards", Mlp(activation="relu_squared"), FusedMlp),
    ("wiring", Residual(mixer_scale="depth"), FusedResidual),
]


def pair(field, plain, kind, backend):
    shared = {"mixer_scale": "depth"} if kind is FusedResidual else {}
    fused = kind(backend=backend, **shared)
    wrap = (lambda part: (part,)) if field == "feedforwards" else (lambda part: part)
    return small(**{field: wrap(plain)}), small(**{field: wrap(fused)})


@pytest.mark.parametrize(("field", "plain", "kind"), FUSED)
def test_a_fused_part_on_its_plain_path_equals_the_plain_part_bit_for_bit(field, plain, kind):
    specs = pair(field, plain, kind, "plain")
    (loss, grads), (fused_loss, fused_grads) = (
        loss_and_gradients(build_model(spec, seed=3)) for spec in specs
    )
    assert loss == fused_loss
    assert all(torch.equal(grads[name], fused_grads[name]) for name in grads)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter runs kernels on machines without a GPU"
)
@pytest.mark.parametrize(("field", "plain", "kind"), FUSED)
def test_a_fused_part_on_its_kernel_equals_the_plain_part_up_to_rounding(field, plain, kind):
    pytest.importorskip("triton")
    specs = pair(field, plain, kind, "triton")
    (loss, grads), (fused_loss, fused_grads) = (
        loss_and_gradients(build_model(spec, seed=3)) for spec in specs
    )
    torch.testing.assert_close(loss, fused_loss, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-6)


def test_auto_takes_the_kernel_where_it_can_run_and_the_plain_path_elsewhere():
    spec = small(head=FusedHead(), wiring=FusedResidual())
    assert resolve(spec, CPU).head.backend == resolve(spec, CPU).wiring.backend == "plain"
    assert resolve(spec, AMPERE).head.backend == resolve(spec, AMPERE).wiring.backend == "triton"


@pytest.mark.parametrize(("field", "plain", "kind"), FUSED)
def test_a_named_kernel_that_cannot_run_is_refused(field, plain, kind):
    _, spec = pair(field, plain, kind, "triton")
    recipe = replace(find("base"), model=spec)
    with pytest.raises(ConfigError, match="backend 'triton' needs an NVIDIA card"):
        resolve(recipe, CPU).validate(CPU)
    assert recipe.refusals(AMPERE) == []


@pytest.mark.parametrize("facts", [CPU, AMPERE, replace(ADA, triton=None)])
def test_an_fp8_head_is_refused_where_its_product_cannot_be_fp8(facts):
    recipe = replace(find("base"), model=small(head=FusedHead(fp8=True)))
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.9 and its Triton kernel"):
        resolve(recipe, facts).validate(facts)
    assert recipe.refusals(ADA) == []
    plain = override(recipe, "model.head.backend=plain")
    assert any("with backend 'plain'" in line for line in plain.refusals(ADA))


@pytest.mark.parametrize("name", ["fp8_gradients", "fp8_forward"])
@pytest.mark.parametrize("facts", [CPU, ADA])
def test_an_fp8_perceptron_is_refused_where_there_is_no_hopper(facts, name):
    part = FusedMlp(**{name: True})
    recipe = replace(find("base"), model=small(feedforwards=(part,)))
    with pytest.raises(ConfigError, match=r"FP8 products of a perceptron need compute capability 9\.0"):
        resolve(recipe, facts).validate(facts)
    assert recipe.refusals(facts)[0].endswith(f"; set model.feedforwards.0.{name}=false")
    hopper = replace(ADA, capability=(9, 0))
    assert recipe.refusals(hopper) == []
    (problem,) = replace(part, activation="gelu").problems()
    assert problem.startswith(f"{name}=true is for activation='relu_squared'")


def test_refusals_of_several_parts_are_told_at_once():
    recipe = replace(
        find("base"), model=small(head=FusedHead(fp8=True), wiring=FusedResidual(backend="triton"))
    )
    with pytest.raises(ConfigError, match=r"backend .triton. needs(.|\n)*an FP8 head needs"):
        resolve(recipe, CPU).validate(CPU)


def test_a_model_trained_with_kernels_loads_where_there_are_none_and_computes_the_same(
    tiny, run_recipe, tmp_path
):
    plain = replace(tiny.model, feedforwards=(Mlp(activation="relu_squared"),))
    run_recipe(replace(tiny, model=plain))
    fused = replace(
        tiny.model,
        feedforwards=(FusedMlp(backend="triton"),),
        wiring=FusedResidual(mixer_scale="depth", backend="triton"),
        head=FusedHead(fp8=True, backend="triton"),
    )
    checkpoints, cpu = tmp_path / "run" / "checkpoints", torch.device("cpu")
    tokens_BT = torch.arange(20)[None]
    found, expected = (
        load_model(replace(tiny, model=spec), checkpoints, device=cpu, warn=pytest.fail)
        for spec in (fused, plain)
    )
    with torch.no_grad():
        assert torch.equal(found.logits(tokens_BT), expected.logits(tokens_BT))


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_a_sampled_head_is_an_estimate_in_training_and_exact_in_evaluation(backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter runs kernels on machines without a GPU")
    heads = (FusedHead(backend=backend, columns=columns) for columns in (0, 60))
    whole, sampled = (build_model(small(head=head), seed=3) for head in heads)
    (exact, _), (estimate, _) = (loss_and_gradients(model) for model in (whole, sampled))
    assert estimate != exact
    torch.testing.assert_close(estimate, exact, rtol=0.05, atol=0)
    (exact, _), (evaluated, _) = (loss_and_gradients(model.eval()) for model in (whole, sampled))
    assert evaluated == exact


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter runs kernels on machines without a GPU"
)
def test_a_sampled_head_on_its_kernel_equals_its_plain_path_up_to_rounding():
    pytest.importorskip("triton")
    heads = (FusedHead(backend=backend, columns=60, softcap=15.0) for backend in ("plain", "triton"))
    models = (build_model(small(head=head), seed=3) for head in heads)
    (loss, grads), (fused_loss, fused_grads) = (loss_and_gradients(model) for model in models)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_counts_its_targets_in_training_and_keeps_the_counts(tied):
    head = FusedHead(backend="plain", tied=tied, columns=60, proposal="counts")
    model = build_model(small(head=head), seed=3)
    model.eval()
    loss_and_gradients(model)
    assert model.head.counts_V.sum() == 0
    targets_BT = torch.tensor([[7, 3, -1, 7]])
    h_BTD = torch.randn(1, 4, model.spec.dim)
    model.train()
    for _ in range(2):
        model.head.loss(h_BTD, targets_BT).backward()
    counts_V = model.state_dict()["head.counts_V"]
    assert {token: count for token, count in enumerate(counts_V.tolist()) if count} == {3: 2, 7: 4}
    sizes_V = model.head.sizes(targets_BT[..., None])
    assert [sizes_V[token].square().round().item() for token in (0, 3, 7)] == [1, 4, 7]


def test_counting_targets_is_a_part_of_the_compiled_graph():
    head, h_BTD = FusedHead(backend="plain", columns=60, proposal="counts"), torch.randn(1, 4, 16)
    targets_BT = torch.tensor([[7, 3, -1, 7]])
    modules = [head.build(dim=16, vocab_size=130).train() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    plain, compiled = modules[0].loss, torch.compile(modules[1].loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert plain(h_BTD, targets_BT) == compiled(h_BTD, targets_BT)
    assert torch.equal(modules[0].counts_V, modules[1].counts_V)
    assert modules[1].counts_V.sum() == 6
    torch._dynamo.reset()


def test_counts_without_a_sample_are_refused():
    assert FusedHead(columns=60, proposal="counts").problems() == []
    assert "columns=0 is none" in FusedHead(proposal="counts").problems()[0]


@pytest.mark.parametrize("columns", [130, 1000])
def test_a_head_with_as_many_columns_as_tokens_is_the_whole_one_bit_for_bit(columns):
    heads = (FusedHead(backend="plain", columns=count) for count in (0, columns))
    models = (build_model(small(head=head), seed=3) for head in heads)
    (loss, grads), (other_loss, other_grads) = (loss_and_gradients(model) for model in models)
    assert loss == other_loss
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_the_soft_cap_bounds_the_logits():
    model = build_model(small(head=FusedHead(softcap=0.01)), seed=0)
    logits_BTV = model.logits(torch.arange(20)[None])
    assert logits_BTV.abs().max() <= 0.01
    assert logits_BTV.abs().max() > 0.001


@pytest.mark.parametrize("kind", [Residual, FusedResidual])
def test_dropout_acts_in_training_only_and_keeps_the_mean(kind):
    model = build_model(small(wiring=kind(dropout=0.5)), seed=0)
    torch.nn.init.normal_(model.blocks[0].mixer.out.weight, std=0.1)
    tokens_BT = torch.arange(20)[None]
    model.eval()
    assert torch.equal(model(tokens_BT), model(tokens_BT))
    model.train()
    assert not torch.equal(model(tokens_BT), model(tokens_BT))
    x_BTD, branch_BTD = torch.zeros(8, 64, 64), torch.ones(8, 64, 64)
    if kind is Residual:
        dropped = model.wiring.drop(branch_BTD)
    else:
        dropped, _ = model.wiring.add(x_BTD, branch_BTD, 1.0)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(dropped.mean().item() - 1) < 0.05


def test_a_dropout_of_one_is_refused():
    assert Residual(dropout=1.0).problems()
    assert FusedResidual(dropout=1.0).problems()


@pytest.mark.parametrize(
    ("part", "pattern"),
    [({"head": FusedHead()}, "head$"), ({"feedforwards": (FusedMlp(),)}, r"feedforward\.(up|down)$")],
    ids=["head", "feedforward"],
)
@pytest.mark.parametrize("make", [lambda p: Fp8(products=(p,)), lambda p: Fp16(fp16_accumulation=(p,))])
def test_a_product_that_a_fused_part_makes_itself_cannot_be_replaced(part, pattern, make):
    precision, cpu = make(pattern), torch.device("cpu")
    precision.prepare(build_model(small(), seed=0), cpu)
    with pytest.raises(ConfigError, match="matches no layer that can take another product"):
        precision.prepare(build_model(small(**part), seed=0), cpu)


def test_training_counts_the_columns_that_it_makes_and_the_model_all_of_them():
    sampled, whole = find("sampled-head"), find("fused-head")
    length, spared = 1024, whole.model.vocab_size - 16_384
    trained, alone = (flops_per_token(r.model, length, r.objective) for r in (sampled, whole))
    assert alone - trained == 3 * 2 * whole.model.dim * spared
    assert flops_per_token(sampled.model, length) == flops_per_token(whole.model, length) == alone
