"""Rotary positions: only differences count, and the tables have an end."""

import math

import pytest
import torch

from sabrage.attention.rotary import Rotary


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [2, 6, 64])
def test_products_depend_on_the_difference_of_positions_alone(width):
    rotary = Rotary(max_length=600).build(width)
    q_BTHK, k_BTHK = draw(1, 9, 3, width), draw(1, 9, 3, width, seed=1)
    positions_BT = torch.tensor([[0, 1, 5, 7, 8, 20, 21, 90, 100]])
    products = []
    for shift in (0, 1, 499):
        q, k = (rotary(x, positions_BT + shift) for x in (q_BTHK, k_BTHK))
        products.append(torch.einsum("bthk,bshk->bhts", q, k))
    torch.testing.assert_close(products[1], products[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(products[2], products[0], atol=2e-5, rtol=0)
    later = torch.einsum("bthk,bshk->bhts", rotary(q_BTHK, positions_BT + 1), rotary(k_BTHK, positions_BT))
    assert not torch.allclose(later, products[0], atol=1e-2)


def test_position_zero_changes_nothing_and_no_position_changes_a_length():
    rotary, x_BTHK = Rotary(max_length=64).build(8), draw(2, 63, 1, 8)
    turned = rotary(x_BTHK)
    assert torch.equal(turned[:, 0], x_BTHK[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x_BTHK.norm(dim=-1))


def test_positions_are_counted_from_zero_unless_given():
    rotary, x_BTHK = Rotary(max_length=32).build(8), draw(2, 17, 3, 8)
    positions_BT = torch.arange(17).expand(2, -1)
    assert torch.equal(rotary(x_BTHK), rotary(x_BTHK, positions_BT))
    assert torch.equal(rotary(x_BTHK)[:, 5:], rotary(x_BTHK[:, 5:], positions_BT[:, 5:]))


def test_each_sequence_has_its_own_positions():
    rotary, x_BTHK = Rotary(max_length=32).build(8), draw(1, 3, 1, 8).repeat(2, 1, 1, 1)
    turned = rotary(x_BTHK, torch.tensor([[4, 5, 6], [9, 10, 11]]))
    assert torch.equal(turned[1:], rotary(x_BTHK[1:], torch.tensor([[9, 10, 11]])))
    assert not torch.equal(turned[0], turned[1])


def test_a_bf16_head_is_turned_in_fp32_and_rounded_once():
    rotary, x_BTHK = Rotary(max_length=4096).build(8), draw(1, 4096, 1, 8).bfloat16()
    turned = rotary(x_BTHK)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotary(x_BTHK.float()).bfloat16())


def test_tables_are_not_saved_and_hold_angles_to_fp32_precision_at_the_far_end():
    tables = Rotary(max_length=16384).build(64)
    assert tables.state_dict() == {}
    for index in (0, 3, 31):
        angle = 16383 * 10000.0 ** (-2 * index / 64)
        assert tables.cosine_TK[16383, index].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert tables.sine_TK[16383, index].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_a_sequence_beyond_the_tables_is_refused_with_the_remedy():
    rotary = Rotary(max_length=16).build(8)
    with pytest.raises(ValueError, match=r"17 tokens, rotary tables of 16; raise rotary.max_length"):
        rotary(draw(1, 17, 1, 8))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 0},
        {"base": 0.0},
        {"base": -1.0},
        {"factor": 0.5},
        {"original_length": 0},
        {"share": 0.0},
        {"share": 1.5},
    ],
)
def test_values_without_meaning_are_problems(changes):
    assert Rotary(**changes).problems()
    assert Rotary().problems() == []


def test_a_factor_of_one_is_plain_rotary_bit_for_bit():
    plain, neutral = (part.build(64) for part in (Rotary(), Rotary(factor=1.0, original_length=77)))
    assert torch.equal(plain.cosine_TK, neutral.cosine_TK)
    assert torch.equal(plain.sine_TK, neutral.sine_TK)


def test_yarn_keeps_fast_turns_stretches_slow_ones_and_sharpens_the_scores():
    part = Rotary(factor=4.0, original_length=1024)
    plain, yarn = Rotary().build(64), part.build(64)
    magnitude = 0.1 * math.log(4) + 1
    # Frequency 0 turns 163 times within 1,024 tokens, frequency 31 less than once.
    torch.testing.assert_close(yarn.cosine_TK[:, 0], magnitude * plain.cosine_TK[:, 0])
    torch.testing.assert_close(yarn.sine_TK[:4096:4, 31], magnitude * plain.sine_TK[:1024, 31])
    # Frequency 8, 0.1, turns 16.297 times: kept by (16.297 - 1) / 31.
    kept = (1024 * 0.1 / (2 * math.pi) - 1) / 31
    angle = 1000 * 0.1 * (kept + (1 - kept) / 4)
    assert yarn.sine_TK[1000, 8].item() == pytest.approx(magnitude * math.sin(angle), abs=1e-5)


def test_of_a_share_the_fast_pairs_turn_as_ever_and_the_others_stand():
    plain, half = Rotary(max_length=64).build(8), Rotary(max_length=64, share=0.5).build(8)
    x_BTHK = draw(2, 40, 3, 8)
    every, some = plain(x_BTHK), half(x_BTHK)
    turning = torch.tensor([True, True, False, False] * 2)
    assert torch.equal(some[..., turning], every[..., turning])
    assert torch.equal(some[..., ~turning], x_BTHK[..., ~turning])
    assert not torch.equal(every[..., ~turning], x_BTHK[..., ~turning])


@pytest.mark.parametrize(("share", "pairs"), [(1.0, 32), (0.5, 16), (0.25, 8), (0.001, 1)])
def test_a_share_is_rounded_and_never_none(share, pairs):
    part = Rotary(max_length=16, share=share)
    assert part.turning(64) == pairs
    assert (part.build(64).sine_TK[1] != 0).tolist() == [True] * pairs + [False] * (32 - pairs)


def test_the_whole_range_of_frequencies_in_a_share_is_a_base_to_that_power():
    """As GPT-NeoX has it: 100^(-2i / 4) for the first four numbers of eight."""
    ours = Rotary(base=100.0**2, share=0.5, max_length=32).build(8)
    theirs = Rotary(base=100.0, max_length=32).build(4)
    torch.testing.assert_close(ours.sine_TK[:, :2], theirs.sine_TK)


def test_with_yarn_what_stands_is_sharpened_like_what_turns():
    plain, yarn = (Rotary(share=0.5, factor=factor, max_length=64).build(64) for factor in (1.0, 4.0))
    assert torch.equal(yarn.sine_TK[:, 16:], plain.sine_TK[:, 16:])
    torch.testing.assert_close(yarn.cosine_TK[:, 16:], (0.1 * math.log(4) + 1) * plain.cosine_TK[:, 16:])


def test_what_is_written_into_one_model_s_tables_stays_there():
    first = Rotary(max_length=8).build(4)
    before = first.cosine_TK.clone()
    first.cosine_TK.fill_(7)
    assert torch.equal(Rotary(max_length=8).build(4).cosine_TK, before)
