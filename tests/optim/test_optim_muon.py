import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sabrage.config import ConfigError
from sabrage.optim.groups import Optimizers
from sabrage.optim.muon import Muon, compiled_update, update
from sabrage.optim.orthogonalise import evened, newton_schulz, polar_express
from sabrage.parts import Knobs, OptimizerGroup

SHAPES = {"qkv": (24, 8), "out": (8, 8), "up": (32, 8), "down": (8, 32), "experts": (2, 32, 8)}
FULL = Muon(normuon=True, cautious=True, weight_decay=0.1, orthogonalise="polar_express")
LONGER = dataclasses.replace(FULL, evens="longer", variance_decay=0.9)


def named_parameters(*, layers=2, seed=0, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"{layer}.{name}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


def give_gradients(named, *, seed):
    """Every parameter gets a gradient that depends on its name and the seed alone."""
    for name, parameter in named:
        generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def knobs(step, **changes):
    return Knobs(step=step, lr=1 / (step + 1), sequence_length=8, tokens_per_step=64, **changes)


def optimizers_of(part, named):
    return Optimizers([OptimizerGroup(pattern=".", optimizer=part)], named, "cpu")


def trained(part, *, steps=3, named=None, **changes):
    """The named parameters after some steps under changing knobs."""
    named = named or named_parameters()
    optimizers = optimizers_of(part, named)
    for step in range(steps):
        give_gradients(named, seed=step)
        optimizers.step(knobs(step, **changes))
        optimizers.zero_grad()
    return dict(named)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("lr_scale", "adjust"), [("spectral", "original"), ("match_rms_adamw", "match_rms_adamw")]
)
def test_muon_agrees_with_torchs_own(nesterov, lr_scale, adjust):
    shapes = {name: SHAPES[name] for name in ("out", "up", "down")}
    start, mine, theirs = ([p for _, p in named_parameters(shapes=shapes)] for _ in range(3))
    names = [name for name, _ in named_parameters(shapes=shapes)]
    part = Muon(lr=0.1, weight_decay=0.2, nesterov=nesterov, lr_scale=lr_scale)
    optimizers = optimizers_of(part, list(zip(names, mine, strict=True)))
    oracle = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.2, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for step in range(3):
        for parameters in (mine, theirs):
            give_gradients(list(zip(names, parameters, strict=True)), seed=step)
        optimizers.step(Knobs(step=step, lr=1.0, sequence_length=8, tokens_per_step=64))
        oracle.step()
    for name, before, found, expected in zip(names, start, mine, theirs, strict=True):
        # The oracle orthogonalises in bfloat16, with its eight bits.
        assert relative_error(found - before, expected - before) < 0.02, name
        momentum = optimizers.state_tensors()[f"{name}/momentum"]
        torch.testing.assert_close(momentum, oracle.state[expected]["momentum_buffer"])


@pytest.mark.parametrize("part", [Muon(weight_decay=0.1), FULL, LONGER])
def test_batched_equals_one_parameter_at_a_time(part):
    together = trained(part)
    for name, parameter in named_parameters():
        alone = trained(part, named=[(name, parameter)])
        torch.testing.assert_close(alone[name], together[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("part", "columns"), [(FULL, 8), (LONGER, 32)], ids=["tall", "wide"])
def test_a_stack_is_that_many_separate_matrices(part, columns):
    fused = nn.Parameter(torch.randn(48, columns, generator=torch.Generator().manual_seed(0)))
    thirds = [nn.Parameter(third.clone()) for third in fused.detach().chunk(3)]
    cube = nn.Parameter(fused.detach().clone().view(3, 16, columns))
    gradient = torch.randn(48, columns, generator=torch.Generator().manual_seed(1))
    fused.grad, cube.grad = gradient.clone(), gradient.clone().view(3, 16, columns)
    for third, piece in zip(thirds, gradient.chunk(3), strict=True):
        third.grad = piece.clone()
    for named in ([("qkv", fused)], [("cube", cube)], [(str(i), third) for i, third in enumerate(thirds)]):
        optimizers_of(part, named).step(knobs(0))
    torch.testing.assert_close(fused.view(3, 16, columns), cube)
    torch.testing.assert_close(fused, torch.cat(thirds))
    whole = nn.Parameter(cube.detach().clone().view(48, columns))
    whole.grad = gradient.clone()
    optimizers_of(dataclasses.replace(part, stacks=()), [("qkv", whole)]).step(knobs(0))
    assert not torch.allclose(whole, fused)


def test_bfloat16_weights_are_the_float32_result_rounded_once():
    half = trained(FULL, steps=1, named=named_parameters(dtype=torch.bfloat16))
    exact = {name: nn.Parameter(p.detach().float()) for name, p in named_parameters(dtype=torch.bfloat16)}
    optimizers = optimizers_of(FULL, list(exact.items()))
    for name, parameter in exact.items():
        give_gradients([(name, parameter)], seed=0)
        parameter.grad = parameter.grad.bfloat16().float()
    optimizers.step(knobs(0))
    for name, parameter in half.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact[name].bfloat16()), name


def test_mixed_dtypes_live_side_by_side_with_float32_state():
    named = named_parameters(layers=1) + [
        (f"half.{name}", parameter) for name, parameter in named_parameters(layers=1, dtype=torch.bfloat16)
    ]
    optimizers = optimizers_of(FULL, named)
    before = {name: parameter.detach().clone() for name, parameter in named}
    give_gradients(named, seed=0)
    optimizers.step(knobs(0))
    assert {value.dtype for value in optimizers.state_tensors().values()} == {torch.float32}
    for name, parameter in named:
        assert parameter.dtype == before[name].dtype
        assert not torch.equal(parameter, before[name])


def test_every_second_step_moves_by_the_gradients_of_both():
    part = Muon(every=2, weight_decay=0.1)
    named, reference = named_parameters(), named_parameters()
    optimizers = optimizers_of(part, named)
    oracle = optimizers_of(dataclasses.replace(part, every=1), reference)
    for step in range(4):
        before = [parameter.detach().clone() for _, parameter in named]
        held = [parameter.grad for _, parameter in named]
        give_gradients(named, seed=step)
        for (_, parameter), earlier in zip(named, held, strict=True):
            parameter.grad = parameter.grad if earlier is None else parameter.grad + earlier
        gradients = [parameter.grad.clone() for _, parameter in named]
        optimizers.step(knobs(step))
        optimizers.zero_grad()
        moved = [not torch.equal(p, old) for (_, p), old in zip(named, before, strict=True)]
        assert moved == [step % 2 == 1] * len(named)
        for (_, parameter), gradient, (_, other) in zip(named, gradients, reference, strict=True):
            if step % 2 == 0:
                assert torch.equal(parameter.grad, gradient)
            else:
                assert parameter.grad is None
                other.grad = gradient
        if step % 2 == 1:
            oracle.step(knobs(step))
    assert all(torch.equal(p, other) for (_, p), (_, other) in zip(named, reference, strict=True))


def test_cautious_decay_spares_weights_that_the_update_does_not_shrink():
    part = Muon(lr=0.1, weight_decay=0.5)
    start = dict(named_parameters())
    plain, cautious, none = (
        trained(dataclasses.replace(part, **changes), steps=1)
        for changes in ({}, {"cautious": True}, {"weight_decay": 0.0})
    )
    for name, weight in start.items():
        # Without decay the weights moved by minus the update.
        agree = (weight - none[name]).sign() == weight.sign()
        assert 0 < agree.float().mean() < 1
        assert torch.equal(cautious[name], torch.where(agree, plain[name], none[name])), name


def test_normuon_keeps_the_norm_of_every_matrix_and_evens_its_rows():
    generator = torch.Generator().manual_seed(0)
    u_SMN = torch.randn(3, 16, 8, generator=generator) * torch.logspace(-1, 1, 16)[:, None]
    variance_SM1 = torch.zeros(3, 16, 1)
    even_SMN = evened(u_SMN, variance_SM1, decay=0.95)
    torch.testing.assert_close(even_SMN.norm(dim=(1, 2)), u_SMN.norm(dim=(1, 2)))
    rows = even_SMN.norm(dim=2)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=1e-4, atol=0)
    torch.testing.assert_close(variance_SM1, 0.05 * u_SMN.square().mean(2, keepdim=True))
    # Another update now meets the memory of the first: the norm is kept, the rows are no longer even.
    other_SMN = torch.randn(3, 16, 8, generator=generator)
    again_SMN = evened(other_SMN, variance_SM1, decay=0.95)
    torch.testing.assert_close(again_SMN.norm(dim=(1, 2)), other_SMN.norm(dim=(1, 2)))
    assert again_SMN.norm(dim=2).std() > 0.1


def test_evening_the_longer_side_of_a_wide_matrix_is_evening_the_rows_of_its_transpose():
    part = dataclasses.replace(LONGER, lr_scale="none")
    wide = nn.Parameter(dict(named_parameters())["0.down"].detach())
    tall = nn.Parameter(wide.detach().T.clone())
    rows = nn.Parameter(wide.detach().clone())
    by_rows = dataclasses.replace(part, evens="rows")
    chosen = [optimizers_of(p, [("w", w)]) for p, w in ((part, wide), (by_rows, tall), (by_rows, rows))]
    for step in range(4):
        give_gradients([("w", wide)], seed=step)
        tall.grad, rows.grad = wide.grad.T.clone(), wide.grad.clone()
        for optimizers in chosen:
            optimizers.step(knobs(step))
    torch.testing.assert_close(wide, tall.T, rtol=1e-6, atol=1e-6)
    mine, other = (optimizers.state_tensors()["w/variance"] for optimizers in chosen[:2])
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)
    assert (rows - wide).abs().max() > 1e-3


def test_evening_the_longer_side_of_a_matrix_that_is_not_wide_is_evening_its_rows():
    shapes = {name: shape for name, shape in SHAPES.items() if name != "down"}
    longer, rows = (
        trained(dataclasses.replace(LONGER, evens=evens), named=named_parameters(shapes=shapes))
        for evens in ("longer", "rows")
    )
    assert all(torch.equal(longer[name], rows[name]) for name in rows)


def test_the_decay_of_the_second_moment_changes_the_update():
    slow, fast = (trained(dataclasses.replace(FULL, variance_decay=decay)) for decay in (0.95, 0.5))
    assert not any(torch.equal(slow[name], fast[name]) for name in slow)


def test_moments_of_columns_come_back_bit_for_bit_for_wide_matrices_alone_fused_and_stacked():
    shapes = {"down": (8, 32), "qkv": (24, 16), "experts": (2, 8, 32)}
    named = named_parameters(shapes=shapes)
    optimizers = optimizers_of(LONGER, named)
    give_gradients(named, seed=0)
    optimizers.step(knobs(0))
    saved = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    found = {name: tuple(saved[f"1.{name}/variance"].shape) for name in shapes}
    assert found == {"down": (32,), "qkv": (48,), "experts": (2, 32)}
    assert all(value.all() for value in saved.values())
    others = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in named]
    resumed = optimizers_of(LONGER, others)
    resumed.load_state_tensors(saved)
    for step in (1, 2):
        for pairs, chosen in ((named, optimizers), (others, resumed)):
            give_gradients(pairs, seed=step)
            chosen.step(knobs(step))
    assert all(torch.equal(p, other) for (_, p), (_, other) in zip(named, others, strict=True))
    with pytest.raises(ConfigError, match=r"'0\.down/variance' is \(32,\)"):
        optimizers_of(FULL, named_parameters(shapes=shapes)).load_state_tensors(saved)


@pytest.mark.parametrize("normuon", [True, False])
def test_zero_gradients_change_nothing_and_stay_finite(normuon):
    named = named_parameters()
    before = {name: parameter.detach().clone() for name, parameter in named}
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizers_of(Muon(normuon=normuon), named).step(knobs(0))
    assert all(torch.equal(parameter, before[name]) for name, parameter in named)


@pytest.mark.parametrize(
    ("method", "function"), [("newton_schulz", newton_schulz), ("polar_express", polar_express)]
)
def test_the_first_step_is_the_scaled_orthogonalised_gradient(method, function):
    part = Muon(lr=0.25, orthogonalise=method, steps=4, lr_scale="spectral")
    weight = nn.Parameter(torch.zeros(32, 8))
    give_gradients([("w", weight)], seed=3)
    optimizers_of(part, [("w", weight)]).step(knobs(0))
    torch.testing.assert_close(weight.detach(), -0.25 * 2.0 * function(weight.grad, steps=4))


def test_the_plans_momentum_overrides_the_parts():
    part = Muon(momentum=0.9)
    own = {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.9, "partial": False}
    assert part.hyperparameters(knobs(1)) == own
    assert part.hyperparameters(knobs(0, momentum=0.5))["momentum"] == 0.5
    planned, own = trained(part, momentum=0.5), trained(dataclasses.replace(part, momentum=0.5))
    assert all(torch.equal(planned[name], own[name]) for name in own)


class Launches(TorchDispatchMode):
    """Counts what is computed; views compute nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "aten" and not function.is_view
        return function(*args, **(kwargs or {}))


def test_more_layers_are_not_more_launches():
    counts = []
    for layers in (1, 6):
        named = named_parameters(layers=layers)
        optimizers = optimizers_of(FULL, named)
        give_gradients(named, seed=0)
        with Launches() as launches:
            optimizers.step(knobs(0))
        counts.append(launches.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("part", [FULL, LONGER], ids=["rows", "longer"])
def test_changing_knobs_recompile_nothing_and_change_nothing(part):
    eager, compiled = named_parameters(), named_parameters()
    reference, optimizers = optimizers_of(part, eager), optimizers_of(part, compiled)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for batch in optimizers.members[0].optimizer.batches:
        batch.update = compiled_update("muon_test", backend=count)
    for step in range(3):
        for named, chosen in ((eager, reference), (compiled, optimizers)):
            give_gradients(named, seed=step)
            chosen.step(knobs(step, momentum=0.8 + step / 20))
            chosen.zero_grad()
    # One graph for each matrix shape: 8 x 8 (qkv and out), 32 x 8 (up and experts) and 8 x 32.
    assert len(graphs) == 3
    for (name, expected), (_, found) in zip(eager, compiled, strict=True):
        assert torch.equal(expected, found), name


def test_compiled_shapes_do_not_share_one_recompile_limit():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for columns in range(2, 2 + torch._dynamo.config.recompile_limit + 2):
        named = [("w", nn.Parameter(torch.ones(2, columns)))]
        optimizer = Muon().build(named)
        optimizer.batches[0].update = compiled_update("muon_test", backend=count)
        give_gradients(named, seed=0)
        optimizer.step()
    assert len(graphs) == torch._dynamo.config.recompile_limit + 2


def test_on_the_cpu_the_update_is_not_compiled():
    optimizer = Muon(compile=True).build(named_parameters())
    assert all(batch.update is update for batch in optimizer.batches)


@pytest.mark.parametrize("part", [Muon(weight_decay=0.1), FULL, LONGER])
def test_while_layers_are_idle_those_without_gradient_stay_and_the_others_move_as_alone(part):
    named, alone = named_parameters(layers=3), named_parameters(layers=3)
    working = [pair for pair in alone if not pair[0].startswith("1.")]
    optimizers, reference = optimizers_of(part, named), optimizers_of(part, working)
    before = None
    for step in range(4):
        give_gradients(named, seed=step)
        give_gradients(working, seed=step)
        if step in (1, 2):
            # Beforehand all moved, so that the idle ones have a momentum that could fade.
            before = before or {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
            weights = {name: parameter.detach().clone() for name, parameter in named}
            for name, parameter in named:
                parameter.grad = None if name.startswith("1.") else parameter.grad
        optimizers.step(knobs(step, layers=2 if step in (1, 2) else 3))
        reference.step(knobs(step))
        state, stayed = optimizers.state_tensors(), step in (1, 2)
        for name, parameter in named:
            if name.startswith("1.") and stayed:
                assert torch.equal(parameter, weights[name])
                own = [key for key in state if key.startswith(f"{name}/")]
                assert all(torch.equal(state[key], before[key]) for key in own)
    assert any(name.endswith("/variance") for name in state) == part.normuon
    for name, parameter in working:
        torch.testing.assert_close(dict(named)[name], parameter, rtol=1e-4, atol=1e-6)
    assert not torch.equal(dict(named)["1.out"], weights["1.out"])
    assert not torch.equal(state["1.out/momentum"], before["1.out/momentum"])


def test_a_parameter_without_gradient_is_named_unless_its_whole_shape_has_none():
    named = named_parameters()
    optimizers = optimizers_of(Muon(), named)
    optimizers.step(knobs(0))
    give_gradients(named, seed=0)
    dict(named)["1.down"].grad = None
    with pytest.raises(ValueError, match=r"'1\.down' has no gradient"):
        optimizers.step(knobs(0))
