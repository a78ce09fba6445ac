"""What becomes of a head's output: the gate, and the token's own value taken out."""

import pytest
import torch

from sabrage.attention.gates import exclusive, gated
from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_gate_is_its_formula_head_by_head():
    y_BTHK, x_BTD, gate_HX = draw(2, 5, 3, 4), draw(2, 5, 20, seed=1), draw(3, 12, seed=2)
    found = gated(y_BTHK, x_BTD, gate_HX)
    for head in range(3):
        opened_BT = 2 * torch.sigmoid(x_BTD[..., :12] @ gate_HX[head])
        torch.testing.assert_close(found[:, :, head], opened_BT[..., None] * y_BTHK[:, :, head])


def test_a_gate_of_a_narrow_model_reads_all_there_is():
    layer = MultiHead(heads=2, gate=True).build(dim=8, layer=0)
    assert layer.gate_HX.shape == (2, 8)
    assert not layer.gate_HX.any()
    layer(draw(1, 3, 8), Context())


def test_what_is_left_has_no_part_along_the_own_value_and_the_rest_is_untouched():
    y_BTHK, v_BTHK = draw(2, 5, 3, 8), draw(2, 5, 3, 8, seed=1)
    left = exclusive(y_BTHK, v_BTHK)
    for y, v, z in zip(*(x.flatten(0, 2).double() for x in (y_BTHK, v_BTHK, left)), strict=True):
        torch.testing.assert_close(z, y - (y @ v) / (v @ v) * v, atol=1e-6, rtol=1e-5)
        assert abs(z @ v) < 1e-5


def test_heads_that_share_a_value_leave_the_same_one_out():
    y_BTHK, v_BTGK = draw(2, 5, 4, 8), draw(2, 5, 2, 8, seed=1)
    expected = exclusive(y_BTHK, v_BTGK.repeat_interleave(2, dim=2))
    assert torch.equal(exclusive(y_BTHK, v_BTGK), expected)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e18])
def test_values_of_any_size_leave_outputs_and_gradients_finite(size):
    y_BTHK, v_BTHK = draw(1, 3, 2, 8).requires_grad_(), (size * draw(1, 3, 2, 8, seed=1)).requires_grad_()
    left = exclusive(y_BTHK, v_BTHK)
    left.square().sum().backward()
    assert left.isfinite().all()
    assert y_BTHK.grad.isfinite().all()
    assert v_BTHK.grad.isfinite().all()
    if size == 0:
        assert torch.equal(left, y_BTHK)


def test_it_is_computed_in_fp32_and_rounded_once():
    y_BTHK, v_BTHK = draw(2, 5, 3, 8).bfloat16(), draw(2, 5, 3, 8, seed=1).bfloat16()
    assert torch.equal(exclusive(y_BTHK, v_BTHK), exclusive(y_BTHK.float(), v_BTHK.float()).bfloat16())


def test_the_first_token_has_nothing_but_itself_and_so_nothing_left():
    layer = MultiHead(heads=2, exclusive_self=True).build(dim=16, layer=0)
    y_BTD = layer(draw(2, 5, 16), Context())
    torch.testing.assert_close(y_BTD[:, 0], torch.zeros(2, 16), atol=1e-6, rtol=0)
    assert y_BTD[:, 1:].abs().amax(-1).min() > 1e-3


def test_the_value_that_is_left_out_is_that_attended_to_with_what_was_added():
    layer = MultiHead(heads=2, exclusive_self=True).build(dim=16, layer=0)
    context = Context(values_BTD=draw(2, 5, 16, seed=3))
    torch.testing.assert_close(layer(draw(2, 5, 16), context)[:, 0], torch.zeros(2, 16), atol=1e-6, rtol=0)
