import pytest
import torch

from sabrage.kernels import symmetric_product as room
from sabrage.kernels.language import KernelError
from sabrage.kernels.symmetric_product import symmetric_product
from sabrage.optim.orthogonalise import newton_schulz, polar_express

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)


def matrices(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@interpreted
def test_tiles_off_the_diagonal_are_mirrored_bit_for_bit() -> None:
    product = symmetric_product(matrices(1, 150, 40))
    tile = room.FP32.m
    assert torch.equal(product[0, :tile, tile:], product[0, tile:, :tile].mT)


@interpreted
def test_a_transposed_matrix_is_read_where_it_lies() -> None:
    tall = matrices(2, 50, 20)
    torch.testing.assert_close(symmetric_product(tall.mT), torch.bmm(tall.mT, tall))


@interpreted
@pytest.mark.parametrize("orthogonalise", [newton_schulz, polar_express])
@pytest.mark.parametrize("shape", [(2, 40, 70), (70, 40), (3, 33, 33)])
def test_orthogonalisation_by_halves_is_the_plain_one(orthogonalise, shape) -> None:
    whole = orthogonalise(matrices(*shape))
    torch.testing.assert_close(orthogonalise(matrices(*shape), halves=True), whole, atol=1e-4, rtol=1e-4)


@interpreted
def test_the_registration_of_the_operation_is_sound() -> None:
    torch.library.opcheck(room._symmetric, (matrices(2, 20, 8), None, 1.0, 0.0))


def test_wrong_shapes_are_refused_with_the_remedy() -> None:
    with pytest.raises(KernelError, match=r"use a\[None\]"):
        symmetric_product(matrices(4, 4))
    with pytest.raises(KernelError, match="the shape of A A"):
        symmetric_product(matrices(2, 4, 3), matrices(2, 4, 3))
