"""Multi-head attention: head widths, what it declares, its options."""

import pytest
import torch

from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context
from sabrage.norms import rms_norm


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("heads", "dim", "remedy"),
    [(7, 768, "use 4, 6, 8"), (0, 64, "use 1, 2, 4"), (64, 64, "use 8, 16, 32"), (1, 7, "use an even dim")],
)
def test_heads_that_do_not_cut_the_width_are_refused_with_counts_that_do(heads, dim, remedy):
    with pytest.raises(ValueError, match=f"mixer.heads={heads} does not cut dim={dim} .*{remedy}"):
        MultiHead(heads=heads).build(dim=dim, layer=0)


def test_it_caches_a_key_and_a_value_of_the_models_width():
    assert MultiHead(heads=4).streams(96) == {"key": 96, "value": 96}


def test_flops_count_four_projections_and_the_average_past():
    # Query, key, value and output; then 3 keys on average of 5 tokens, for scores and for values.
    assert MultiHead(heads=2).flops(8, 5) == 2 * 4 * 8 * 8 + 2 * 2 * 8 * 3


def test_without_rotary_only_the_order_of_the_past_is_lost():
    mixer = MultiHead(heads=2, rotary=None).build(dim=8, layer=0)
    x_BTD = draw(1, 6, 8)
    swapped_BTD = x_BTD[:, [1, 0, 2, 3, 4, 5]]
    one, other = (mixer(x, Context())[:, -1] for x in (x_BTD, swapped_BTD))
    torch.testing.assert_close(one, other)
    placed = MultiHead(heads=2).build(dim=8, layer=0)
    assert not torch.allclose(*(placed(x, Context())[:, -1] for x in (x_BTD, swapped_BTD)))


def test_qk_norm_makes_the_scores_blind_to_the_size_of_queries_and_keys():
    x_BTD = draw(2, 9, 16)
    outputs = []
    for factor in (1.0, 7.0):
        torch.manual_seed(0)
        mixer = MultiHead(heads=2, qk_norm=True).build(dim=16, layer=0)
        with torch.no_grad():
            mixer.qkv.weight[:32] *= factor
        outputs.append(mixer(x_BTD, Context()))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_a_zero_initialised_mixer_adds_nothing_and_can_learn():
    mixer = MultiHead(heads=2, zero_init=True).build(dim=8, layer=0)
    y_BTD = mixer(rms_norm(draw(1, 5, 8)), Context())
    assert not y_BTD.any()
    y_BTD.sum().backward()
    assert mixer.out.weight.grad.any()
