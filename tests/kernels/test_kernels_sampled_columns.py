"""A sampled softmax: which columns it takes, what they count, and that the kernel computes just that."""

import math

import pytest
import torch

from sabrage.kernels import cross_entropy as head
from sabrage.kernels.cases import Case
from sabrage.kernels.catalogue import CROSS_ENTROPY
from sabrage.kernels.sampled_columns import choose_columns, most_frequent

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = [{}, {"softcap": 15.0}, {"rescale": (23.0, 5.0, 7.5)}, {"rescale": (100.0, 5.0, 20.0)}]
# Odd in every size; sixty targets at most.
CASE = Case("here", {"N": 31, "D": 32, "V": 217, "W": 2}, {"num_real": 211})


def arguments(case: Case = CASE, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    return CROSS_ENTROPY.inputs(case, torch.Generator(device).manual_seed(3), dtype) | case.options


def outcome(function, given: dict, **changes: object) -> tuple[torch.Tensor, ...]:
    """(total, losses, gradient of h, gradient of the weight)."""
    given = given | changes
    h, weight = (given[name].clone().requires_grad_() for name in ("h_ND", "weight_VD"))
    total, losses_W = function(**(given | {"h_ND": h, "weight_VD": weight}))
    total.backward()
    return total.detach(), losses_W, h.grad, weight.grad


def by_hand(
    *,
    h_ND,
    weight_VD,
    targets_NW,
    weights_W,
    num_real,
    columns,
    sample_tokens=0,
    wanted_V=None,
    softcap=None,
    rescale=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in fp64, one target at a time, over the tokens chosen and not over columns."""
    losses: list[list[torch.Tensor]] = [[] for _ in weights_W]
    stretch = sample_tokens or len(h_ND)
    for h_MD, targets_MW in zip(h_ND.split(stretch), targets_NW.split(stretch), strict=True):
        sizes = {"num_real": num_real, "num_columns": columns, "wanted_V": wanted_V}
        ids = choose_columns(targets_MW, **sizes)[0].tolist()
        targets = {target for target in targets_MW.flatten().tolist() if target >= 0}
        wanted = set() if wanted_V is None else set(wanted_V.nonzero().flatten().tolist())
        certain = targets | wanted if len(targets | wanted) < columns else targets
        taken = targets & set(ids)
        others = sorted(set(ids) - certain)
        weight = (num_real - len(certain)) / len(others) if others else 1.0
        z_MV = head.bounded(h_MD.double() @ weight_VD.double().T, softcap, rescale)[:, :num_real]
        kept = sorted(certain & set(ids))
        normaliser_M = z_MV[:, kept].exp().sum(1) + weight * z_MV[:, others].exp().sum(1)
        for found, targets_M in zip(losses, targets_MW.unbind(1), strict=True):
            pairs = [(m, target) for m, target in enumerate(targets_M.tolist()) if target in taken]
            found += [normaliser_M[m].log() - z_MV[m, target] for m, target in pairs]
    losses_W = torch.stack([torch.stack(found).mean() for found in losses])
    return (weights_W * losses_W).sum(), losses_W.detach()


def assert_near(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=2e-6)


@interpreted
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("columns", [64, 131, 210, 20], ids=["few", "odd", "all but one", "too few"])
def test_the_loss_and_its_gradients_are_those_computed_by_hand(
    columns: int, bound: dict, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(head, "BLOCK", 64)
    given = arguments() | bound | {"columns": columns}
    exact = outcome(by_hand, given)
    assert_near(outcome(head.cross_entropy_head, given, chunk_tokens=9), exact)
    assert_near(outcome(head.cross_entropy_head_reference, given), exact)


@interpreted
@pytest.mark.parametrize("sample_tokens", [8, 30], ids=["stretches", "one token left"])
@pytest.mark.parametrize("columns", [64, 131, 7], ids=["few", "odd", "too few"])
def test_stretches_of_tokens_have_columns_of_their_own(
    columns: int, sample_tokens: int, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(head, "BLOCK", 64)
    given = arguments() | {"softcap": 15.0, "columns": columns, "sample_tokens": sample_tokens}
    exact = outcome(by_hand, given)
    assert_near(outcome(head.cross_entropy_head, given, chunk_tokens=5), exact)
    assert_near(outcome(head.cross_entropy_head_reference, given), exact)


@interpreted
@pytest.mark.parametrize("columns", [90, 60], ids=["room for all", "for targets alone"])
def test_what_is_wanted_is_no_sample_where_there_is_room(columns: int, poisoned: None) -> None:
    wanted_V = torch.zeros(211, dtype=torch.bool)
    wanted_V[5:60] = True
    given = arguments() | {"columns": columns, "sample_tokens": 16, "wanted_V": wanted_V}
    exact = outcome(by_hand, given)
    assert_near(outcome(head.cross_entropy_head, given, chunk_tokens=9), exact)
    assert_near(outcome(head.cross_entropy_head_reference, given), exact)
    assert outcome(head.cross_entropy_head, given | {"wanted_V": None})[0] != exact[0]


@pytest.mark.parametrize("columns", [30, 12], ids=["room for all", "for targets alone"])
def test_wanted_tokens_come_after_the_targets_and_before_the_sample(columns: int) -> None:
    targets_NW = torch.tensor([[5], [90], [7]])
    wanted_V = torch.zeros(100, dtype=torch.bool).index_fill(0, torch.arange(5, 16), True)
    ids_K, _, weighing_2 = choose_columns(targets_NW, num_real=100, num_columns=columns, wanted_V=wanted_V)
    certain = {5, 7, 90, *range(5, 16)} if columns == 30 else {5, 7, 90}
    assert set(ids_K[:3].tolist()) == {5, 7, 90}
    assert set(ids_K[: len(certain)].tolist()) == certain
    weight = (100 - len(certain)) / (columns - len(certain))
    torch.testing.assert_close(weighing_2, torch.tensor([len(certain), math.log2(weight)]))


def test_the_most_frequent_are_those_with_the_largest_counts_and_of_equal_ones_the_lowest() -> None:
    counts_V = torch.tensor([3, 0, 7, 3, 3, 10**12])
    chosen = [most_frequent(counts_V, number).nonzero().flatten().tolist() for number in (1, 2, 4, 9)]
    assert chosen == [[5], [2, 5], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_a_sample_without_the_frequent_is_nearer_to_the_whole_softmax() -> None:
    generator = torch.Generator().manual_seed(2)
    weight_VD = torch.randn(500, 16, generator=generator) / 4
    # The first forty are likely everywhere, by a number that all states share.
    weight_VD[:, 0] = 0
    weight_VD[:40, 0] = 3
    wanted_V = torch.arange(500) < 40
    errors: list[list[float]] = [[], []]
    for _ in range(20):
        h_ND = torch.randn(32, 16, generator=generator)
        h_ND[:, 0] = 1
        targets_NW = torch.randint(500, (32, 1), generator=generator)
        given = {"h_ND": h_ND, "weight_VD": weight_VD, "targets_NW": targets_NW}
        exact = outcome(head.cross_entropy_head_reference, given)[3]
        for told, wanted in zip(errors, (None, wanted_V), strict=True):
            changes = {"columns": 120, "wanted_V": wanted}
            told.append(
                (outcome(head.cross_entropy_head_reference, given, **changes)[3] - exact).norm().item()
            )
    assert sum(errors[1]) < 0.5 * sum(errors[0])


@pytest.mark.parametrize("wanted_V", [torch.ones(211), torch.ones(200, dtype=torch.bool)])
def test_what_is_wanted_is_told_by_one_bool_a_token(wanted_V: torch.Tensor) -> None:
    with pytest.raises(head.KernelError, match=r"wanted_V is .*allowed: bool \(211,\)"):
        head.cross_entropy_head(**arguments(), columns=80, wanted_V=wanted_V)


@interpreted
@pytest.mark.parametrize("function", [head.cross_entropy_head, head.cross_entropy_head_reference])
def test_a_stretch_of_all_tokens_is_the_micro_batch_bit_for_bit(function) -> None:
    whole, *others = (outcome(function, arguments(), columns=80, sample_tokens=n) for n in (0, 31, 10**9))
    assert all(torch.equal(*pair) for other in others for pair in zip(other, whole, strict=True))


def test_several_samples_are_nearer_to_the_whole_softmax_than_one() -> None:
    generator = torch.Generator().manual_seed(2)
    errors: dict[int, list[float]] = {64: [], 16: []}
    for _ in range(40):
        given = {
            "h_ND": torch.randn(64, 16, generator=generator),
            "weight_VD": torch.randn(500, 16, generator=generator) / 2,
            "targets_NW": torch.randint(80, (64, 1), generator=generator),
        }
        exact = outcome(head.cross_entropy_head_reference, given)[3]
        for tokens, told in errors.items():
            changes = {"columns": 120, "sample_tokens": tokens}
            told.append(
                (outcome(head.cross_entropy_head_reference, given, **changes)[3] - exact).norm().item()
            )
    # What each of four misses evens out, though tokens that are targets elsewhere are no longer certain.
    assert sum(errors[16]) < 0.85 * sum(errors[64])


@interpreted
def test_only_the_chosen_rows_have_a_gradient() -> None:
    given = arguments()
    ids_K, _, _ = choose_columns(given["targets_NW"], num_real=211, num_columns=80)
    weight_grad = outcome(head.cross_entropy_head, given, columns=80)[3]
    assert weight_grad.any(1).nonzero().flatten().tolist() == sorted(ids_K.tolist())


@interpreted
@pytest.mark.parametrize("function", [head.cross_entropy_head, head.cross_entropy_head_reference])
@pytest.mark.parametrize("columns", [211, 212, 50000])
def test_as_many_columns_as_tokens_are_the_whole_softmax_bit_for_bit(columns: int, function) -> None:
    whole, sampled = (outcome(function, arguments(), columns=count) for count in (0, columns))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sampled, whole, strict=True))


@interpreted
@pytest.mark.parametrize("columns", [80, 20], ids=["enough", "too few"])
@pytest.mark.parametrize("target", [211, 216, 10**9])
def test_a_target_outside_the_vocabulary_is_loud_in_its_set(target: int, columns: int) -> None:
    given = arguments() | {"columns": columns}
    given["targets_NW"][4, 0] = target
    total, losses_W = head.cross_entropy_head(**given)
    assert total.isnan()
    assert losses_W.isnan().tolist() == [True, False]


def test_targets_are_the_first_columns_and_all_others_once_at_most() -> None:
    targets_NW = torch.tensor([[5, 90], [-1, 5], [7, 0], [99, -1]])
    ids_K, columns_NW, weighing_2 = choose_columns(targets_NW, num_real=100, num_columns=20)
    assert ids_K.unique().numel() == 20
    assert set(ids_K[:5].tolist()) == {0, 5, 7, 90, 99}
    assert torch.equal(columns_NW < 0, targets_NW < 0)
    assert torch.equal(ids_K[columns_NW[targets_NW >= 0]], targets_NW[targets_NW >= 0])
    torch.testing.assert_close(weighing_2, torch.tensor([5.0, math.log2(95 / 15)]))


def test_of_too_many_targets_a_sample_stays_and_nothing_weighs_more() -> None:
    targets_NW = torch.arange(30)[:, None]
    ids_K, columns_NW, weighing_2 = choose_columns(targets_NW, num_real=100, num_columns=20)
    left_N = columns_NW[:, 0] >= 0
    assert left_N.nonzero().flatten().tolist() == sorted(ids_K.tolist())
    assert torch.equal(ids_K[columns_NW[left_N, 0]], targets_NW[left_N, 0])
    assert weighing_2.tolist() == [30.0, 0.0]


def test_as_many_targets_as_columns_leave_no_sample() -> None:
    targets_NW = torch.arange(20)[:, None]
    ids_K, _, weighing_2 = choose_columns(targets_NW, num_real=100, num_columns=20)
    assert sorted(ids_K.tolist()) == list(range(20))
    assert weighing_2.tolist() == [20.0, 0.0]


def draws(count: int, *, num_real: int, num_columns: int):
    """(targets, columns) of batches with the same four distinct targets in other places; 7 is at row 0."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        places_N = torch.randint(4, (40,), generator=generator)
        places_N[:4] = torch.arange(4)
        targets_NW = torch.tensor([7, 0, 30, 99])[places_N][:, None]
        yield targets_NW, choose_columns(targets_NW, num_real=num_real, num_columns=num_columns)[0]


def test_every_other_token_is_drawn_equally_often() -> None:
    count, drawn_V = 3000, torch.zeros(100)
    for _, ids_K in draws(count, num_real=100, num_columns=28):
        drawn_V[ids_K] += 1
    other_V = torch.ones(100, dtype=torch.bool).index_fill(0, torch.tensor([7, 0, 30, 99]), False)
    assert (drawn_V[~other_V] == count).all()
    share = 24 / 96
    squares = ((drawn_V[other_V] - count * share) ** 2 / (count * share * (1 - share))).sum()
    # Chi-squared of 96 tokens: 95 and 14 are its mean and deviation.
    assert abs(squares - 95) < 4 * 14


def test_the_sum_of_exponentials_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    weight_VD = torch.randn(100, 16, generator=generator)
    h_ND = torch.randn(1, 16, generator=generator).expand(40, 16) / 4
    z_V = (weight_VD @ h_ND[0]).double()
    estimates = []
    for targets_NW, _ in draws(1000, num_real=100, num_columns=28):
        alone_NW = torch.full_like(targets_NW, -1)
        alone_NW[0] = 7
        # A second set for what else is a target; the first row's loss is the first set's mean.
        pair_NW = torch.cat((alone_NW, targets_NW), 1)
        _, losses_W = head.cross_entropy_head_reference(h_ND, weight_VD, pair_NW, columns=28)
        estimates.append((losses_W[0].double() + z_V[7]).exp())
    found = torch.stack(estimates)
    error = found.std() / len(found) ** 0.5
    exact = z_V.exp().sum()
    assert abs(found.mean() - exact) < 4 * error
    # Were the weight 1 and not 4, the mean would be off by most of the sum.
    assert error < 0.01 * exact
    assert found.log().mean() < exact.log()


def test_equal_targets_draw_the_same_and_others_something_else() -> None:
    targets_NW = arguments()["targets_NW"]

    def drawn(targets_NW: torch.Tensor) -> list[int]:
        return choose_columns(targets_NW, num_real=211, num_columns=100)[0].tolist()

    torch.manual_seed(0)
    first = drawn(targets_NW)
    torch.manual_seed(1)
    assert drawn(targets_NW.clone()) == first
    other_NW = targets_NW.clone()
    other_NW[0, 0] = targets_NW[1, 0]
    assert drawn(other_NW) != first
    assert drawn(targets_NW.flip(0)) != first


def test_a_compiled_draw_is_the_eager_one() -> None:
    targets_NW = arguments()["targets_NW"]
    compiled = torch.compile(choose_columns, fullgraph=True, dynamic=False, backend="aot_eager")
    found = compiled(targets_NW, num_real=211, num_columns=100)
    for ours, theirs in zip(found, choose_columns(targets_NW, num_real=211, num_columns=100), strict=True):
        assert torch.equal(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("sample_tokens", [0, 200], ids=["one sample", "four with wanted tokens"])
@pytest.mark.parametrize("columns", [4096, 16384, 300], ids=["whole blocks", "GPT-2", "too few"])
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_a_sample_on_the_device_is_the_one_computed_by_hand(
    bound: dict, columns: int, sample_tokens: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case("device", {"N": 777, "D": 64, "V": 50304, "W": 2}, {"num_real": 50257})
    wanted_V = (torch.arange(50257, device="cuda") < 2000) if sample_tokens else None
    sampling = {"columns": columns, "sample_tokens": sample_tokens, "wanted_V": wanted_V}
    given = arguments(case, device="cuda") | bound | sampling
    on_host = {name: value.cpu() if torch.is_tensor(value) else value for name, value in given.items()}
    assert torch.equal(
        *(
            choose_columns(each["targets_NW"], num_real=50257, num_columns=columns)[0].cpu()
            for each in (given, on_host)
        )
    )
    found = outcome(head.cross_entropy_head, given, chunk_tokens=256)
    exact = outcome(by_hand, on_host)
    for ours, theirs in zip(found, exact, strict=True):
        error = (ours.cpu().double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 1e-4


@pytest.mark.gpu
@needs_cuda
def test_choosing_columns_never_waits_for_the_device() -> None:
    targets_NW = arguments(device="cuda")["targets_NW"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids_K, _, _ = choose_columns(targets_NW, num_real=50257, num_columns=16384)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids_K.unique().numel() == 16384
