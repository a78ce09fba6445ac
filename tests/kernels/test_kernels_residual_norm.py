import pytest
import torch

from sabrage.kernels import residual_norm as room
from sabrage.kernels.language import KernelError
from sabrage.kernels.residual_norm import dropout_keep, residual_norm, residual_norm_linear

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
SEED = torch.tensor(2**40 + 11)


def stream(rows: int = 6, dim: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator), torch.randn(rows, dim, generator=generator)


def test_the_reference_draws_the_published_philox_numbers() -> None:
    """Counter 0, key 0: the first known answer of Random123's test vectors for philox4x32-10."""
    first_words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    zero = torch.tensor(0)
    for word, column in zip(first_words, range(4), strict=True):
        share = ((word >> 8) + 0.5) / 2**24
        assert not dropout_keep(zero, 1, 16, p=share + 2**-24)[0, column]
        assert dropout_keep(zero, 1, 16, p=share - 2**-24)[0, column]


def test_the_mask_keeps_its_share_and_changes_with_the_seed() -> None:
    mask, other = (dropout_keep(torch.tensor(seed), 100, 100, p=0.25) for seed in (1, 2))
    assert abs(mask.float().mean() - 0.75) < 0.02
    assert abs((mask == other).float().mean() - (0.75**2 + 0.25**2)) < 0.02


@interpreted
@pytest.mark.parametrize("dim", [40, 64, 217])
def test_the_kernel_drops_what_the_reference_drops(dim: int) -> None:
    x, y = torch.zeros(5, dim), torch.ones(5, dim)
    r, _ = residual_norm(x, y, p=0.4, seed=SEED)
    assert torch.equal(r != 0, dropout_keep(SEED, 5, dim, p=0.4))


@interpreted
def test_the_backward_pass_drops_what_the_forward_pass_dropped() -> None:
    x, y = stream()
    y.requires_grad_()
    r, _ = residual_norm(x, y, p=0.5, seed=SEED)
    r.sum().backward()
    assert torch.equal(y.grad != 0, dropout_keep(SEED, 6, 40, p=0.5))


@interpreted
def test_without_dropout_the_stream_is_the_plain_sum_bit_for_bit() -> None:
    x, y = stream()
    for seed in (None, SEED):
        assert torch.equal(residual_norm(x, y, p=0.0, seed=seed)[0], x + y)


@interpreted
def test_only_the_results_are_kept_for_the_backward_pass() -> None:
    """Dropout's mask has the shape of the stream; nothing of that shape but r is saved."""
    x, y = stream()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        r, _ = residual_norm(x, y.requires_grad_(), p=0.5, seed=SEED)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() == r.numel()] == [r.data_ptr()]


@interpreted
def test_a_wide_stream_keeps_its_dtype_and_the_norm_takes_the_branch_s() -> None:
    x, y = stream()
    y = y.half().requires_grad_()
    r, n = residual_norm(x.requires_grad_(), y)
    assert (r.dtype, n.dtype) == (torch.float32, torch.float16)
    (r.sum() + n.float().square().sum()).backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.float16)


@interpreted
def test_batches_of_sequences_are_taken_as_they_are() -> None:
    x, y = stream(rows=6)
    flat = residual_norm(x, y)
    shaped = residual_norm(x.view(2, 3, 40), y.view(2, 3, 40))
    for one, other in zip(flat, shaped, strict=True):
        assert torch.equal(one.view(2, 3, 40), other)


@interpreted
def test_the_linear_layer_reads_the_norm() -> None:
    x, y = stream()
    matrix = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    r, out = residual_norm_linear(x, y, matrix, kind="layer")
    wanted_r, n = residual_norm(x, y, kind="layer")
    assert torch.equal(r, wanted_r)
    assert torch.equal(out, n @ matrix.t())


@interpreted
def test_the_registration_of_the_operation_is_sound() -> None:
    x, y = stream()
    weight = torch.ones(40)
    leaves = [tensor.requires_grad_() for tensor in (x, y, weight)]
    torch.library.opcheck(room._forward, (*leaves, None, SEED, True, 1e-6, 0.3, 1.0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"p": 1.0}, "p=1.0"),
        ({"p": 0.1}, "without a seed"),
        ({"bias_D": torch.ones(40)}, "bias without a weight"),
    ],
)
def test_wrong_options_are_refused_with_the_remedy(options: dict, sentence: str) -> None:
    with pytest.raises(KernelError, match=sentence):
        residual_norm(*stream(), **options)


def test_a_branch_of_another_shape_is_refused() -> None:
    x, y = stream()
    with pytest.raises(KernelError, match="allowed: equal"):
        residual_norm(x, y[:3])
