import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sabrage.config import ConfigError, from_json, part_classes, to_json
from sabrage.generate.text import load_model
from sabrage.linear import Linear
from sabrage.model.lm import build_model
from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup, Precision
from sabrage.precision.autocast import Bf16, Bf16Weights, Fp32, Tf32
from sabrage.precision.fp8 import Fp8
from sabrage.precision.fp16 import Fp16
from sabrage.run.checkpoint import load_newest
from sabrage.run.device import DeviceFacts

CPU = torch.device("cpu")
ALL = (r"qkv", r"out", r"up", r"down", r"head")
FP8 = Fp8(products=ALL)
DELAYED = Fp8(products=ALL, scaling="delayed")
FAST = Fp16(fp16_accumulation=ALL)
RISING = Fp16(initial_scale=2.0**24, growth_interval=3)
NARROW = [Bf16(), Bf16Weights(), Fp16(), FAST, FP8, DELAYED]
MUON = (
    OptimizerGroup(pattern=r"blocks", optimizer=Muon(normuon=True)),
    OptimizerGroup(pattern=".", optimizer=AdamW(lr=0.01)),
)
LEAST = {Fp32: (0, 0), Tf32: (8, 0), Bf16: (8, 0), Bf16Weights: (8, 0), Fp16: (7, 0), Fp8: (8, 9)}

# The distance from 1 to the next number of the format; a processor has no TF32 and multiplies in fp32.
SPACING = {Tf32: 1e-6, Bf16: 2**-7, Bf16Weights: 2**-7, Fp16: 2**-10, Fp8: 2**-3}


def label(value):
    if isinstance(value, Precision):
        return type(value).__name__ + ("-delayed" if value == DELAYED else "-fast" if value == FAST else "")
    return None


def card(major, minor):
    return DeviceFacts(kind="cuda", name=f"card {major}.{minor}", memory=1, capability=(major, minor))


def outcome(step, batch):
    """(loss, logits, unscaled gradients by name) of one forward and backward pass."""
    learner = step.learner
    total, _ = learner(batch.tokens_BT, batch.targets_BT, None, None)
    scale = 1.0 if learner.scaler is None else learner.scaler.scale
    (total * scale).backward()
    with torch.no_grad(), learner.precision.autocast(CPU):
        logits_BTV = learner.model.logits(batch.tokens_BT).float()
    return total.item(), logits_BTV, {n: p.grad.float() / scale for n, p in learner.named_parameters()}


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize("kind", LEAST)
def test_a_card_is_refused_exactly_where_it_lacks_the_format_and_offered_one_it_has(kind, capability):
    sentence = kind().refusal(card(*capability))
    assert (sentence is None) == (capability >= LEAST[kind])
    if sentence:
        least, own = (".".join(map(str, pair)) for pair in (LEAST[kind], capability))
        assert f"needs a GPU of compute capability {least} and card {own} has {own}" in sentence
        remedy = re.search(r"--set precision=(\w+)$", sentence)[1]
        assert part_classes()[remedy]().refusal(card(*capability)) is None


@pytest.mark.parametrize("kind", LEAST)
def test_a_processor_is_refused_what_only_a_gpu_has(kind):
    facts = DeviceFacts(kind="cpu", name="a processor", memory=1)
    assert (kind().refusal(facts) is None) == (kind not in (Tf32, Fp8))


@pytest.mark.parametrize("precision", [Fp32(), Tf32(), *NARROW], ids=label)
def test_preparing_sets_every_switch_of_the_process(precision, tiny):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    precision.prepare(build_model(tiny.model, seed=0), CPU)
    expected = "high" if isinstance(precision, Tf32) else "highest"
    assert torch.get_float32_matmul_precision() == expected
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


@pytest.mark.parametrize("precision", [Tf32(), *NARROW], ids=label)
def test_outputs_and_gradients_are_those_of_fp32_up_to_the_spacing_of_the_format(precision, make_step, batch):
    spacing = SPACING[type(precision)]
    loss, logits, gradients = outcome(make_step(Fp32()), batch())
    own_loss, own_logits, own_gradients = outcome(make_step(precision), batch())
    assert abs(own_loss - loss) < spacing
    assert error(own_logits, logits) < spacing
    assert max(error(own_gradients[name], gradients[name]) for name in gradients) < 2 * spacing
    if not isinstance(precision, Tf32):
        assert error(own_logits, logits) > spacing / 16


@pytest.mark.parametrize("optim", [None, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("precision", [Tf32(), *NARROW], ids=label)
def test_a_short_training_follows_fp32(precision, optim, make_step, batch, knobs):
    def train(precision):
        step = make_step(precision, optim=optim)
        return torch.stack([step(batch(index), knobs(index)) for index in range(20)])

    plain, narrow = train(Fp32()), train(precision)
    assert plain[-1] < plain[0] - 1
    assert (narrow - plain).abs().max() < (0.1 if isinstance(precision, Fp8) else 0.04)


@pytest.mark.parametrize("precision", [Fp32(), Tf32(), *NARROW], ids=label)
def test_names_shapes_and_initial_weights_of_parameters_do_not_depend_on_the_precision(precision, make_step):
    plain = dict(make_step(Fp32()).learner.named_parameters())
    own = dict(make_step(precision).learner.named_parameters())
    assert list(own) == list(plain)
    assert all(torch.equal(own[name], plain[name].to(own[name].dtype)) for name in plain)


@pytest.mark.parametrize("precision", [FP8, DELAYED, Fp16(), FAST, Bf16Weights()], ids=label)
def test_forward_and_backward_compile_to_one_graph_with_the_same_result(precision, make_step, batch):
    plain, compiled = make_step(precision), make_step(precision)
    loss, _, gradients = outcome(plain, batch())
    compiled.learner.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    own_loss, _, own_gradients = outcome(compiled, batch())
    torch._dynamo.reset()
    spacing = SPACING[type(precision)]
    assert abs(own_loss - loss) < spacing / 8
    assert max(error(own_gradients[name], gradients[name]) for name in gradients) < spacing
    for name, buffer in plain.learner.named_buffers():
        torch.testing.assert_close(compiled.learner.get_buffer(name), buffer, rtol=spacing, atol=0)


@pytest.mark.parametrize("precision", [FP8, DELAYED, FAST], ids=label)
def test_evaluation_uses_plain_products(precision, make_step, batch):
    logits = []
    for each in (precision, Fp16() if precision == FAST else Bf16()):
        model = make_step(each).learner.model.eval()
        with torch.no_grad(), each.autocast(CPU):
            logits.append(model.logits(batch().tokens_BT))
    assert torch.equal(*logits)


@pytest.mark.parametrize("precision", [RISING, Bf16Weights(), DELAYED])
def test_a_resumed_run_ends_in_the_same_bits(precision, tiny, run_recipe, monkeypatch):
    monkeypatch.setattr(Fp8, "refusal", lambda self, facts: None)
    budget = replace(tiny.budget, checkpoint_every=6)
    recipe = replace(tiny, precision=precision, budget=budget, optim=MUON)
    folder = run_recipe(recipe)[1].path
    whole = load_newest(folder / "checkpoints", warn=pytest.fail)
    (folder / "result.json").unlink()
    whole.path.rename(folder / "elsewhere")
    assert precision != RISING or whole.tensors["learner/scaler.overflows"] > 1
    run_recipe(recipe, resume=True)
    again = load_newest(folder / "checkpoints", warn=pytest.fail)
    assert again.step == whole.step == 12
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[name], whole.tensors[name]) for name in whole.tensors)
    load_model(recipe, folder / "checkpoints", device=CPU, warn=pytest.fail)


@pytest.mark.parametrize("precision", [Fp32(), *NARROW], ids=label)
def test_a_step_reads_nothing_back_from_the_device(precision, make_step, batch, knobs):
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor was read"
            return function(*args, **(kwargs or {}))

    step = make_step(precision, optim=MUON)
    step(batch(), knobs(0))
    with Reads():
        step(batch(), knobs(1))


def test_bf16_weights_leave_vectors_masters_and_optimizer_state_in_fp32(make_step, batch, knobs):
    step = make_step(Bf16Weights())
    vector = torch.nn.Parameter(torch.ones(3))
    step.learner.register_parameter("gain", vector)
    Bf16Weights().prepare(step.learner, CPU)
    assert vector.dtype == torch.float32
    step(batch(), knobs())
    assert step.learner.model.embedding.weight.dtype == torch.bfloat16
    state = step.optimizers.state_tensors()
    assert {value.dtype for value in state.values()} == {torch.float32}
    for name, parameter in step.learner.named_parameters():
        if name != "gain":
            assert torch.equal(parameter, state[f"{name}/master"].bfloat16())


@pytest.mark.parametrize("precision", [Fp8(products=("nothing",)), Fp16(fp16_accumulation=("nothing",))])
def test_a_pattern_that_matches_no_layer_is_refused(precision, tiny):
    with pytest.raises(ConfigError, match=r"'nothing' matches no layer.*blocks\.\*\.mixer\.qkv.*head"):
        precision.prepare(build_model(tiny.model, seed=0), CPU)


def test_a_layer_whose_weight_a_kernel_reads_is_not_replaced(tiny):
    model = build_model(tiny.model, seed=0)
    model.head.replaceable = False
    with pytest.raises(ConfigError, match="'head' matches no layer"):
        Fp8(products=("head",)).prepare(model, CPU)


@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        (Fp8(products=("(",)), "not a regular expression"),
        (Fp8(products=()), "products is empty"),
        (Fp16(fp16_accumulation=("(",)), "not a regular expression"),
        (Fp16(initial_scale=0.0), "initial_scale=0.0"),
        (Fp16(growth_interval=0), "growth_interval=0"),
    ],
)
def test_impossible_values_are_problems(precision, sentence):
    assert any(sentence in problem for problem in precision.problems())


@pytest.mark.parametrize("precision", [Fp32(), Tf32(), *NARROW], ids=label)
def test_precisions_survive_json(precision):
    assert from_json(json.loads(json.dumps(to_json(precision))), Precision) == precision


def test_a_linear_layer_is_torchs_own_bit_for_bit():
    torch.manual_seed(0)
    own = Linear(7, 5)
    torch.manual_seed(0)
    torchs = torch.nn.Linear(7, 5, bias=False)
    x = torch.randn(3, 7)
    assert torch.equal(own.weight, torchs.weight)
    assert torch.equal(own(x), torchs(x))
