import pytest
import torch

from sabrage.kernels import cross_entropy as head
from sabrage.kernels.cases import Case
from sabrage.kernels.catalogue import CROSS_ENTROPY
from sabrage.kernels.head_products import Products
from sabrage.kernels.language import KernelError

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
CASE = Case("here", {"N": 30, "D": 32, "V": 192, "W": 2}, {"num_real": 180, "softcap": 15.0})
BOUND = [30.0, 0.0, 7.5]


def arguments(dtype: torch.dtype = torch.float32, case: Case = CASE, device: str = "cpu") -> dict:
    return CROSS_ENTROPY.inputs(case, torch.Generator(device).manual_seed(3), dtype) | case.options


def gradients(dtype: torch.dtype = torch.float32, **changes: object) -> tuple[torch.Tensor, ...]:
    """(total, gradient of h, gradient of the weight), in fp32."""
    given = arguments(dtype) | changes
    h, weight = given["h_ND"].requires_grad_(), given["weight_VD"].requires_grad_()
    total, _ = head.cross_entropy_head(**given)
    total.backward()
    return total.detach().float(), h.grad.float(), weight.grad.float()


class GivenLogits(Products):
    """The logits are what is given as h; the narrow copy of their gradient is NaN until it is written."""

    def __init__(self, logits_NV: torch.Tensor) -> None:
        super().__init__(logits_NV, logits_NV.new_empty(0))

    def logits(self, part: slice) -> torch.Tensor:
        return self.h_MD[part].clone()

    def narrow(self, logits_CV: torch.Tensor) -> torch.Tensor:
        # Interpreted, a rounding to e5m2 that should carry into the exponent halves the number.
        dtype = torch.float8_e5m2 if logits_CV.is_cuda else torch.float16
        return torch.full_like(logits_CV, float("nan"), dtype=torch.float32).to(dtype)


def row_pass(
    rows: int, num_real: int, bound: dict, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(what the kernel makes, what it should make), and the narrow gradient beside the wide one.

    Three sets: the first and the last real column, columns of the middle, ignored ones, and targets that two
    or all three sets share; the padding is loud.
    """
    generator = torch.Generator(device).manual_seed(5)
    logits_NV = 4 * torch.randn(8, rows, generator=generator, device=device)
    logits_NV[:, num_real:] = 1000.0
    logits_NV = logits_NV.to(dtype)
    last, middle = num_real - 1, num_real // 2
    targets = [(0, last, middle), (last, last, 0), (0, 0, 0), (-1, last, -1), (-1, -1, -1)]
    targets += [(middle, -1, middle), (last, 0, last), (last, last, last)]
    targets_NW = torch.tensor(targets, device=device)
    weights_W = torch.tensor([1.0, 0.5, 0.25], device=device)
    nll_NW = torch.full(targets_NW.shape, float("nan"), device=device)
    products = GivenLogits(logits_NV)
    constants = list(bound.get("rescale") or (0.0, 0.0, 0.0))
    wide_NV, narrow_NV = head._row_pass(
        products, slice(None), targets_NW, weights_W, nll_NW, num_real, constants, True
    )
    leaf_NV = logits_NV.double().requires_grad_()
    z_NV = head.bounded(leaf_NV[:, :num_real], None, bound.get("rescale"))
    picked_NW = z_NV.gather(1, targets_NW.clamp(min=0))
    exact_NW = (z_NV.logsumexp(1, keepdim=True) - picked_NW).masked_fill(targets_NW < 0, 0.0)
    (exact_NW * weights_W).sum().backward()
    made = {"nll": nll_NW.double(), "gradient": wide_NV.double(), "narrow": narrow_NV.double()}
    exact = {"nll": exact_NW.detach(), "gradient": leaf_NV.grad}
    return made, exact | {"narrow": wide_NV.to(narrow_NV.dtype).double()}


BOUNDS = [{}, {"rescale": (30.0, 0.0, 7.5)}, {"rescale": (100.0, 5.0, 20.0)}]


@interpreted
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("rows", "num_real"),
    [(64, 40), (64, 1), (192, 180), (128, 128), (192, 128), (320, 129)],
    ids=["in one block", "one column", "tail", "whole blocks", "a block of padding", "two of them and more"],
)
def test_a_row_is_right_wherever_its_targets_and_its_end_lie(
    rows: int, num_real: int, bound: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "BLOCK", 64)
    made, exact = row_pass(rows, num_real, bound)
    assert not made["gradient"][:, num_real:].any()
    assert not made["narrow"][:, num_real:].any()
    assert torch.equal(made["narrow"], exact["narrow"])
    for name in ("nll", "gradient"):
        torch.testing.assert_close(made[name], exact[name], rtol=1e-5, atol=5e-5)


@interpreted
@pytest.mark.parametrize("loud", [1e30, -1e30, float("inf"), float("-inf")])
def test_a_bound_takes_whatever_logit_there_is(loud: float) -> None:
    """A logit far beyond the bound is at it: neither NaN nor a gradient of its own."""
    h = torch.zeros(1, 64)
    h[0, :3] = torch.tensor([loud, 1.0, -1.0])
    weights_W, nll_NW = torch.ones(1), torch.empty(1, 1)
    for target in (0, 1):
        targets_NW = torch.tensor([[target]])
        grad_NV, _ = head._row_pass(
            GivenLogits(h), slice(None), targets_NW, weights_W, nll_NW, 60, BOUND, True
        )
        z = head.bounded(h[:, :60], None, (BOUND[0], BOUND[1], BOUND[2]))
        torch.testing.assert_close(nll_NW[:, 0], z.logsumexp(1) - z[:, target])
        assert grad_NV.isfinite().all()
        assert grad_NV[0, 0].abs() < 1e-6


@interpreted
@pytest.mark.parametrize("columns", [0, 96])
def test_chunks_do_not_change_the_loss_or_its_gradients(columns: int) -> None:
    given = {"columns": columns}
    for whole, pieces in zip(gradients(**given), gradients(**given, chunk_tokens=7), strict=True):
        torch.testing.assert_close(pieces, whole)


@interpreted
def test_padding_rows_get_no_gradient_and_no_probability() -> None:
    total, _, weight_grad = gradients()
    assert not weight_grad[180:].any()
    louder = arguments()["weight_VD"]
    louder[180:] = 100.0
    torch.testing.assert_close(gradients(weight_VD=louder)[0], total)


@interpreted
def test_without_gradients_the_loss_is_the_same_and_none_is_made() -> None:
    with torch.no_grad():
        total, losses_W = head.cross_entropy_head(**arguments())
    assert torch.equal(total, gradients()[0])
    assert losses_W.shape == (2,)
    given = arguments()
    made = head._head(
        given["h_ND"],
        given["weight_VD"],
        given["targets_NW"],
        given["weights_W"],
        None,
        BOUND,
        180,
        0,
        0,
        False,
        8,
        False,
    )
    assert made[2].numel() == made[3].numel() == 0


@interpreted
@pytest.mark.parametrize(
    "bound", [{"softcap": 300.0}, {"rescale": (300.0, 5.0, 7.5)}, {"softcap": None}], ids=str
)
def test_logits_too_low_for_a_plain_sum_are_no_less_right(bound: dict) -> None:
    """In the middle of a high bound exp(z - height) is 0 in fp32, and so would be a row's sum."""
    given = arguments() | {"softcap": None} | bound
    found = []
    for function in (head.cross_entropy_head, head.cross_entropy_head_reference):
        h, weight = (given[name].clone().requires_grad_() for name in ("h_ND", "weight_VD"))
        total, losses_W = function(**(given | {"h_ND": h, "weight_VD": weight}))
        total.backward()
        found.append((total.detach(), losses_W, h.grad, weight.grad))
    assert found[0][0].isfinite()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@interpreted
def test_a_set_without_targets_counts_nothing() -> None:
    given = arguments()
    given["targets_NW"][:, 1] = -1
    total, losses_W = head.cross_entropy_head(**given)
    assert losses_W[1] == 0
    torch.testing.assert_close(total, losses_W[0])


@interpreted
def test_a_target_outside_the_vocabulary_is_loud_in_its_set() -> None:
    given = arguments()
    given["targets_NW"][4, 0] = 180
    total, losses_W = head.cross_entropy_head(**given)
    assert total.isnan()
    assert losses_W.isnan().tolist() == [True, False]


@interpreted
def test_a_logit_that_is_no_number_is_loud() -> None:
    given = arguments()
    given["h_ND"][4, 0] = float("nan")
    _, losses_W = head.cross_entropy_head(**given)
    assert losses_W.isnan().all()


@interpreted
def test_held_gradients_do_not_shrink_as_tokens_are_added() -> None:
    """A gradient of 1/N a token would leave fp16's range long before a real batch's N."""
    given = arguments(torch.float16)
    held = []
    for copies in (1, 4):
        tokens = (given["h_ND"][:16].repeat(copies, 1), given["weight_VD"])
        targets_NW = given["targets_NW"][:16].repeat(copies, 1)
        held.append(
            head._head(*tokens, targets_NW, given["weights_W"], None, BOUND, 180, 0, 0, False, 64, True)[2][
                :16
            ]
        )
    torch.testing.assert_close(*held)


@interpreted
@pytest.mark.parametrize("columns", [0, 96])
def test_fp8_stays_near_the_16_bit_head(columns: int) -> None:
    total, h_grad, weight_grad = gradients(torch.float16, columns=columns)
    total8, h_grad8, weight_grad8 = gradients(torch.float16, columns=columns, fp8=True)
    assert (total8 - total).abs() < 0.01 * total
    assert (h_grad8 - h_grad).norm() < 0.12 * h_grad.norm()
    assert (weight_grad8 - weight_grad).norm() < 0.05 * weight_grad.norm()
    assert not torch.equal(h_grad8, h_grad)


@interpreted
def test_autocast_decides_the_products_and_the_weight_keeps_its_dtype() -> None:
    given = arguments()
    h, weight = given["h_ND"].requires_grad_(), given["weight_VD"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        total, _ = head.cross_entropy_head(**given)
    total.backward()
    narrow = head.cross_entropy_head(**(arguments() | {"h_ND": h.detach().half()}))[0]
    assert torch.equal(total, narrow)
    assert h.grad.dtype == weight.grad.dtype == torch.float32


@interpreted
@pytest.mark.parametrize("columns", [0, 96])
def test_the_registration_of_the_operation_is_sound(columns: int) -> None:
    given = arguments()
    tensors = [given["h_ND"].requires_grad_(), given["weight_VD"].requires_grad_(), given["targets_NW"]]
    sizes_V = torch.arange(1, 181).double()
    plain = (BOUND, 180, columns, 10, False, 8, True)
    torch.library.opcheck(head._head, (*tensors, given["weights_W"], sizes_V, *plain))


@interpreted
def test_a_device_that_cannot_run_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(KernelError, match=r"on device 'cpu'.*use the plain path"):
        head.cross_entropy_head(**arguments())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets_NW": torch.zeros(30, dtype=torch.int64)}, "targets_N\\[:, None\\]"),
        ({"num_real": 200}, "num_real=200"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"columns": -1}, "columns=-1"),
        ({"sample_tokens": -1}, "sample_tokens=-1"),
        ({"fp8": True, "h_ND": torch.zeros(30, 20), "weight_VD": torch.zeros(192, 20)}, "16 divides"),
    ],
)
@interpreted
def test_wrong_arguments_are_refused_with_the_remedy(changes: dict, sentence: str) -> None:
    with pytest.raises(KernelError, match=sentence):
        head.cross_entropy_head(**(arguments() | changes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_head_never_holds_the_logits_of_the_batch() -> None:
    case = Case("memory", {"N": 16384, "D": 256, "V": 16384, "W": 1})
    given = arguments(torch.bfloat16, case, "cuda")
    h, weight = given["h_ND"].requires_grad_(), given["weight_VD"].requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head.cross_entropy_head(**given, chunk_tokens=2048)[0].backward()
    held = torch.cuda.max_memory_allocated() - before
    chunk, results = 2 * 2048 * 16384, 4 * (h.numel() + weight.numel())
    assert held < chunk + 4 * results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize(("rows", "num_real"), [(50304, 50257), (8192, 8192), (12288, 8192), (1024, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_on_the_device_is_right_wherever_its_targets_and_its_end_lie(
    dtype: torch.dtype, rows: int, num_real: int, bound: dict
) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    made, exact = row_pass(rows, num_real, bound, dtype, "cuda")
    assert not made["gradient"][:, num_real:].any()
    assert not made["narrow"][:, num_real:].any()
    torch.testing.assert_close(made["nll"], exact["nll"], rtol=1e-5, atol=1e-4)
    tolerance = 5e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(made["gradient"], exact["gradient"], rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(made["narrow"], exact["narrow"], rtol=2**-2, atol=2**-14)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [0, 1500])
def test_fp8_on_the_device_stays_near_the_16_bit_head(columns: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 products need compute capability 8.9")
    case = Case("fp8", {"N": 512, "D": 256, "V": 4096, "W": 2}, {"num_real": 4000})
    found = []
    for fp8 in (False, True):
        given = arguments(torch.bfloat16, case, "cuda")
        h = given["h_ND"].requires_grad_()
        total, _ = head.cross_entropy_head(**given, fp8=fp8, chunk_tokens=128, columns=columns)
        total.backward()
        found.append((total.detach(), h.grad.float()))
    assert (found[1][0] - found[0][0]).abs() < 0.01 * found[0][0]
    assert (found[1][1] - found[0][1]).norm() < 0.1 * found[0][1].norm()
