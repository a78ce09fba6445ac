"""A sampled softmax: which columns it takes, what they count, and that the kernel computes just that."""

import pytest
import torch

from sabrage.kernels import cross_entropy as head
from sabrage.kernels.cases import Case
from sabrage.kernels.catalogue import CROSS_ENTROPY
from sabrage.kernels.sampled_columns import choose_columns, sizes_of

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
    sizes_V=None,
    softcap=None,
    rescale=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in fp64, one target at a time, over the tokens chosen and not over columns."""
    losses: list[list[torch.Tensor]] = [[] for _ in weights_W]
    stretch = sample_tokens or len(h_ND)
    for h_MD, targets_MW in zip(h_ND.split(stretch), targets_NW.split(stretch), strict=True):
        ids_K, _, bits_K = choose_columns(targets_MW, num_real=num_real, num_columns=columns, sizes_V=sizes_V)
        counts = dict(zip(ids_K.tolist(), (2.0 ** bits_K.double()).tolist(), strict=True))
        taken = {target for target in targets_MW.flatten().tolist() if target in counts}
        z_MV = head.bounded(h_MD.double() @ weight_VD.double().T, softcap, rescale)[:, :num_real]
        normaliser_M = sum(count * z_MV[:, token].exp() for token, count in counts.items())
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


def sizes(count: int = 211) -> torch.Tensor:
    """From a tenth to ten."""
    return 10 ** torch.linspace(-1, 1, count, dtype=torch.float64)


@interpreted
@pytest.mark.parametrize("columns", [90, 60], ids=["many", "few"])
def test_tokens_are_drawn_by_their_sizes(columns: int, poisoned: None) -> None:
    given = arguments() | {"columns": columns, "sample_tokens": 16, "sizes_V": sizes()}
    exact = outcome(by_hand, given)
    assert_near(outcome(head.cross_entropy_head, given, chunk_tokens=9), exact)
    assert_near(outcome(head.cross_entropy_head_reference, given), exact)
    assert outcome(head.cross_entropy_head, given | {"sizes_V": None})[0] != exact[0]


def test_a_column_counts_as_often_as_its_size_goes_into_the_priority_that_was_passed_over() -> None:
    targets_NW = torch.tensor([[5], [90], [7]])
    ids_K, _, bits_K = choose_columns(targets_NW, num_real=100, num_columns=30, sizes_V=sizes(100))
    assert set(ids_K[:3].tolist()) == {5, 7, 90}
    assert bits_K[:3].tolist() == [0, 0, 0]
    # What counts more than once does so in inverse proportion to its size.
    counts_K, sizes_K = 2.0 ** bits_K[3:].double(), sizes(100)[ids_K[3:]]
    more_K = counts_K > 1
    passed = counts_K[more_K] * sizes_K[more_K]
    torch.testing.assert_close(passed, passed[:1].expand_as(passed), rtol=4e-3, atol=0)
    assert (sizes_K[~more_K] >= 0.99 * passed[0]).all()
    assert 3 < more_K.sum() < 27


def test_sizes_are_roots_of_counts_and_none_is_zero() -> None:
    found = sizes_of(torch.tensor([0, 3, 10**12]))
    floor = (10**12 + 3) * 2.0**-22
    torch.testing.assert_close(
        found.square(), torch.tensor([floor + 1, floor + 4, floor + 1 + 10**12], dtype=torch.float64)
    )


@pytest.mark.parametrize("by_size", [False, True])
def test_the_count_of_a_token_is_one_on_average(by_size: bool) -> None:
    """Whether it is drawn, times how often it counts then."""
    count, total_V = 3000, torch.zeros(100, dtype=torch.float64)
    for targets_NW, _ in draws(count, num_real=100, num_columns=28):
        told = sizes(100) if by_size else None
        ids_K, _, bits_K = choose_columns(targets_NW, num_real=100, num_columns=28, sizes_V=told)
        total_V[ids_K] += 2.0 ** bits_K.double()
    mean_V = total_V / count
    # The smallest of them counts some forty times, once in forty draws.
    assert (mean_V - 1).abs().max() < 0.6
    assert abs(mean_V.mean() - 1) < 0.02


def test_a_sample_by_frequencies_is_nearer_to_the_whole_softmax() -> None:
    generator = torch.Generator().manual_seed(2)
    weight_VD = torch.randn(500, 16, generator=generator) / 4
    # The first forty are likely everywhere, by a number that all states share.
    weight_VD[:, 0] = 0
    weight_VD[:40, 0] = 3
    frequencies_V = torch.where(torch.arange(500) < 40, 1000, 1)
    errors: list[list[float]] = [[], []]
    for _ in range(20):
        h_ND = torch.randn(32, 16, generator=generator)
        h_ND[:, 0] = 1
        targets_NW = torch.randint(500, (32, 1), generator=generator)
        given = {"h_ND": h_ND, "weight_VD": weight_VD, "targets_NW": targets_NW}
        exact = outcome(head.cross_entropy_head_reference, given)[3]
        for told, drawn_by in zip(errors, (None, sizes_of(frequencies_V)), strict=True):
            changes = {"columns": 120, "sizes_V": drawn_by}
            found = outcome(head.cross_entropy_head_reference, given, **changes)[3]
            told.append((found - exact).norm().item())
    assert sum(errors[1]) < 0.5 * sum(errors[0])


@pytest.mark.parametrize("sizes_V", [torch.ones(211), torch.ones(200, dtype=torch.float64)])
def test_sizes_are_one_number_a_token(sizes_V: torch.Tensor) -> None:
    with pytest.raises(head.KernelError, match=r"sizes_V is .*allowed: torch.float64 \(211,\)"):
        head.cross_entropy_head(**arguments(), columns=80, sizes_V=sizes_V)


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
    ids_K, columns_NW, bits_K = choose_columns(targets_NW, num_real=100, num_columns=20)
    assert ids_K.unique().numel() == 20
    assert set(ids_K[:5].tolist()) == {0, 5, 7, 90, 99}
    assert torch.equal(columns_NW < 0, targets_NW < 0)
    assert torch.equal(ids_K[columns_NW[targets_NW >= 0]], targets_NW[targets_NW >= 0])
    assert bits_K[:5].tolist() == [0.0] * 5
    # 95 / 15 times on average; in one draw, by the priority of the sixteenth.
    assert bits_K[5:].unique().numel() == 1
    assert 3 < 2 ** bits_K[5] < 13


def test_of_too_many_targets_a_sample_stays_and_nothing_weighs_more() -> None:
    targets_NW = torch.arange(30)[:, None]
    ids_K, columns_NW, bits_K = choose_columns(targets_NW, num_real=100, num_columns=20)
    left_N = columns_NW[:, 0] >= 0
    assert left_N.nonzero().flatten().tolist() == sorted(ids_K.tolist())
    assert torch.equal(ids_K[columns_NW[left_N, 0]], targets_NW[left_N, 0])
    assert bits_K.tolist() == [0.0] * 20


def test_as_many_targets_as_columns_leave_no_sample() -> None:
    targets_NW = torch.arange(20)[:, None]
    ids_K, _, bits_K = choose_columns(targets_NW, num_real=100, num_columns=20)
    assert sorted(ids_K.tolist()) == list(range(20))
    assert bits_K.tolist() == [0.0] * 20


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
    assert error < 0.02 * exact
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
@pytest.mark.parametrize("sample_tokens", [0, 200], ids=["one sample", "four by sizes"])
@pytest.mark.parametrize("columns", [4096, 16384, 300], ids=["whole blocks", "GPT-2", "too few"])
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_a_sample_on_the_device_is_the_one_computed_by_hand(
    bound: dict, columns: int, sample_tokens: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case("device", {"N": 777, "D": 64, "V": 50304, "W": 2}, {"num_real": 50257})
    sizes_V = sizes(50257).cuda() if sample_tokens else None
    sampling = {"columns": columns, "sample_tokens": sample_tokens, "sizes_V": sizes_V}
    given = arguments(case, device="cuda") | bound | sampling
    on_host = {name: value.cpu() if torch.is_tensor(value) else value for name, value in given.items()}
    assert torch.equal(
        *(
            choose_columns(each["targets_NW"], num_real=50257, num_columns=columns, sizes_V=each["sizes_V"])[
                0
            ].cpu()
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
