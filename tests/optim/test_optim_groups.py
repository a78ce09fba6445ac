import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sabrage.config import ConfigError
from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import Optimizers, assign
from sabrage.optim.muon import Muon
from sabrage.parts import Knobs, OptimizerGroup
from sabrage.plan import Constant, Plan, Trapezoid

EVERY_OTHER = Muon(every=2, normuon=True, weight_decay=0.1, cautious=True)
GROUPS = [
    OptimizerGroup(pattern=r"blocks.*weight", optimizer=EVERY_OTHER),
    OptimizerGroup(pattern=r"embedding|gain", optimizer=AdamW(lr=0.01)),
]


def group(pattern, optimizer=None):
    return OptimizerGroup(pattern=pattern, optimizer=optimizer or AdamW())


def named_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.weight": (13, 8),
        "blocks.0.qkv.weight": (24, 8),
        "blocks.0.up.weight": (16, 8),
        "blocks.1.qkv.weight": (24, 8),
        "blocks.1.up.weight": (16, 8),
        "gain": (8,),
    }
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def knobs(step):
    return Knobs(step=step, lr=1 / (step + 1), sequence_length=8, tokens_per_step=64, momentum=0.8)


def train(optimizers, named, steps):
    """One turn of the training loop per step: gradients add up, then step, then zero_grad."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for _, parameter in named:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizers.step(knobs(step))
        optimizers.zero_grad()


def test_the_first_matching_group_wins():
    named = named_parameters()
    first, second, rest = assign([group("qkv"), group(r"^blocks\.0"), group(".")], named)
    assert [name for name, _ in first[1]] == ["blocks.0.qkv.weight", "blocks.1.qkv.weight"]
    assert [name for name, _ in second[1]] == ["blocks.0.up.weight"]
    assert [name for name, _ in rest[1]] == ["embedding.weight", "blocks.1.up.weight", "gain"]
    assert first[1][0][1] is named[1][1]


def test_all_unmatched_parameters_and_idle_patterns_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        assign([group("blocks"), group("embeding.weight"), group("qkv")], named_parameters())
    text = str(caught.value)
    assert "parameter 'embedding.weight' (13, 8) (did you mean 'embeding.weight'?)" in text
    assert "parameter 'gain' (8,);" in text
    assert "'embeding.weight' matches no parameter (did you mean 'embedding.weight'?)" in text
    assert "'qkv' is idle: earlier groups take all" in text


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ConfigError, match="not a regular expression"):
        assign([group("blocks(")], named_parameters())


def test_tied_parameters_appear_once_and_frozen_ones_never():
    tied, frozen = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    named = [("embedding.weight", tied), ("head.weight", tied), ("table", frozen)]
    ((_, parameters),) = assign([group("weight")], named)
    assert [name for name, _ in parameters] == ["embedding.weight"]


def test_a_model_left_on_another_device_is_refused():
    with pytest.raises(
        ConfigError, match=r"'embedding.weight' is on cpu and the run on cuda.*move the model"
    ):
        Optimizers([group(".")], named_parameters(), "cuda")


def test_groups_with_equal_parts_share_one_optimizer():
    optimizers = Optimizers(
        [group("blocks"), group("emb"), group("gain", AdamW(lr=1.0))], named_parameters(), "cpu"
    )
    assert [len(member.parameters) for member in optimizers.members] == [5, 1]


def test_state_is_there_before_the_first_step_and_keyed_by_parameter_name():
    state = Optimizers(GROUPS, named_parameters(), "cpu").state_tensors()
    assert {
        key: tuple(value.shape) for key, value in state.items() if "blocks.0" in key or "gain" in key
    } == {
        "blocks.0.qkv.weight/momentum": (24, 8),
        "blocks.0.qkv.weight/variance": (24,),
        "blocks.0.up.weight/momentum": (16, 8),
        "blocks.0.up.weight/variance": (16,),
        "gain/step": (),
        "gain/exp_avg": (8,),
        "gain/exp_avg_sq": (8,),
    }
    assert not any(value.any() for value in state.values())


@pytest.mark.parametrize("saved_after", [4, 5])
def test_resumed_training_is_the_same_bit_for_bit(tmp_path, saved_after):
    through = named_parameters()
    optimizers = Optimizers(GROUPS, through, "cpu")
    train(optimizers, through, range(saved_after))
    save_file(optimizers.state_tensors(), tmp_path / "optimizers.safetensors")
    resumed = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in through]
    train(optimizers, through, range(saved_after, 9))

    again = Optimizers(GROUPS, resumed, "cpu")
    again.load_state_tensors(load_file(tmp_path / "optimizers.safetensors"))
    train(again, resumed, range(saved_after, 9))
    for (name, expected), (_, found) in zip(through, resumed, strict=True):
        assert torch.equal(expected, found), name
    expected, found = optimizers.state_tensors(), again.state_tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_restored_snapshot_undoes_warm_up_steps_waiting_gradients_included():
    named = named_parameters()
    optimizers = Optimizers(GROUPS, named, "cpu")
    fresh = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    train(optimizers, named, range(3))
    assert any(key.endswith("/gradient") for key in optimizers.state_tensors())
    optimizers.load_state_tensors(fresh)
    state = optimizers.state_tensors()
    assert state.keys() == fresh.keys()
    assert all(torch.equal(state[key], fresh[key]) for key in fresh)
    assert all(parameter.grad is None for _, parameter in named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("gain/exp_avg"), "'gain/exp_avg' is missing"),
        (lambda state: state.update({"gian/exp_avg": torch.zeros(8)}), "did you mean 'gain/exp_avg"),
        (
            lambda state: state.update({"gain/exp_avg": torch.zeros(7)}),
            r"\(7,\) torch.float32, allowed: \(8,\)",
        ),
        (
            lambda state: state.update({"gain/exp_avg": torch.zeros(8).double()}),
            "float64, allowed: .* torch.float32",
        ),
        (lambda state: state.update({"gain/gradient": torch.zeros(7)}), r"'gain/gradient' is \(7,\)"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    named = named_parameters()
    optimizers = Optimizers(GROUPS, named, "cpu")
    other = {key: value.clone() + 1 for key, value in optimizers.state_tensors().items()}
    change(other)
    with pytest.raises(ConfigError, match=message):
        optimizers.load_state_tensors(other)
    assert not any(value.any() for value in optimizers.state_tensors().values())


def test_zero_grad_can_keep_the_gradient_tensors():
    named = named_parameters()
    optimizers = Optimizers([group(".")], named, "cpu")
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizers.zero_grad(set_to_none=False)
    assert not any(parameter.grad.any() for _, parameter in named)
    optimizers.zero_grad()
    assert all(parameter.grad is None for _, parameter in named)


def rates(optimizers, plan, step):
    """The learning rate of every optimizer's first parameter at a step, by its name."""
    for _, parameter in (pair for member in optimizers.members for pair in member.parameters):
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(plan.at(step))
    return {member.parameters[0][0]: member.optimizer.param_groups[0]["lr"] for member in optimizers.members}


def test_a_groups_own_schedule_takes_the_place_of_the_plans():
    plan = Plan(steps=10, lr=Constant(value=0.5), tokens_per_step=8, sequence_length=8)
    own = Trapezoid(warmup=0, warmdown=10)
    optimizer = AdamW(lr=0.01)
    groups = [
        OptimizerGroup(pattern="embedding", optimizer=optimizer, lr=own),
        OptimizerGroup(pattern=".", optimizer=optimizer),
    ]
    optimizers = Optimizers(groups, named_parameters(), "cpu")
    for step in (0, 5, 9):
        assert rates(optimizers, plan, step) == {
            "embedding.weight": pytest.approx(0.01 * own.at(step, 10)),
            "blocks.0.qkv.weight": pytest.approx(0.005),
        }


def test_groups_alike_in_optimizer_and_schedule_share_one_optimizer():
    groups = [group("embedding"), group("qkv"), OptimizerGroup(pattern=".", optimizer=AdamW(), lr=Constant())]
    assert len(Optimizers(groups, named_parameters(), "cpu").members) == 2


def test_a_group_without_a_schedule_moves_bit_for_bit_as_with_the_plans_own():
    weights = []
    for own in (None, Constant(value=0.25)):
        groups = [OptimizerGroup(pattern=".", optimizer=AdamW(lr=0.01), lr=own)]
        named = named_parameters()
        optimizers = Optimizers(groups, named, "cpu")
        for parameter in (pair[1] for pair in named):
            parameter.grad = torch.ones_like(parameter)
        optimizers.step(Knobs(step=0, lr=0.25, sequence_length=8, tokens_per_step=64))
        weights.append([parameter for _, parameter in named])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
