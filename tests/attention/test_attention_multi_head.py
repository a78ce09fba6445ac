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


def test_key_value_heads_may_be_fewer_and_are_cached_as_such():
    part = MultiHead(heads=4, kv_heads=2)
    assert part.streams(96) == {"key": 48, "value": 48}
    assert part.flops(96, 1) == 2 * (2 * 96 * 96 + 2 * 96 * 48) + 2 * 2 * 96
    mixer = part.build(dim=96, layer=0)
    assert {name: tuple(weight.shape) for name, weight in mixer.named_parameters()} == {
        "query.weight": (96, 96), "key.weight": (48, 96), "value.weight": (48, 96), "out.weight": (96, 96),
    }  # fmt: skip


def test_shared_heads_equal_a_whole_set_of_copies():
    torch.manual_seed(0)
    shared = MultiHead(heads=4, kv_heads=2, qk_norm=True).build(dim=32, layer=0)
    whole = MultiHead(heads=4, kv_heads=4, qk_norm=True).build(dim=32, layer=0)
    keys, values = (
        layer.weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        for layer in (shared.key, shared.value)
    )
    with torch.no_grad():
        whole.qkv.weight.copy_(torch.cat((shared.query.weight, keys, values)))
        whole.out.weight.copy_(shared.out.weight)
    x_BTD = draw(2, 9, 32)
    torch.testing.assert_close(shared(x_BTD, Context()), whole(x_BTD, Context()))


@pytest.mark.parametrize("kv_heads", [-1, 3, 8])
def test_key_value_heads_that_do_not_divide_the_heads_are_refused_with_counts_that_do(kv_heads):
    with pytest.raises(ValueError, match=rf"kv_heads={kv_heads} does not divide .*use 1, 2, 4, or 0"):
        MultiHead(heads=4, kv_heads=kv_heads).build(dim=64, layer=0)


def test_a_windowed_layer_forgets_what_lies_beyond_its_window():
    mixer = MultiHead(heads=2, window=4).build(dim=16, layer=0)
    x_BTD = draw(1, 12, 16)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 3] += 1
    moved = (mixer(x_BTD, Context()) != mixer(changed_BTD, Context())).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 5


@pytest.mark.parametrize(
    ("share", "plan", "window"),
    [(0.5, 1024, 512), (0.3, 1024, 320), (0.01, 1024, 64), (1.0, 100, 128), (1.0, None, None)],
)
def test_a_share_of_the_plans_window_is_whole_blocks_and_never_none_of_them(share, plan, window):
    assert MultiHead(heads=1, window_share=share).window_of(Context(window=plan)) == window


def test_a_window_of_its_own_does_not_follow_the_plan():
    assert MultiHead(heads=1, window=7).window_of(Context(window=512)) == 7
    assert MultiHead(heads=1).window_of(Context(window=512)) is None


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (MultiHead(heads=1, window=0), "window=0 must be at least 1"),
        (MultiHead(heads=1, window_share=0.0), "window_share=0.0 must be above 0"),
        (MultiHead(heads=1, window=9, window_share=0.5), "are both set"),
    ],
)
def test_windows_without_meaning_are_problems(part, said):
    assert said in part.problems()[0]
    assert MultiHead(heads=1, window=9).problems() == []


def test_flops_count_the_window():
    full, windowed = MultiHead(heads=2), MultiHead(heads=2, window=3)
    # 1, 2, 3, 3 and 3 of five tokens' keys, 12 in all.
    assert windowed.flops(8, 5) == 2 * 4 * 8 * 8 + 2 * 2 * 8 * 12 // 5
    assert windowed.flops(8, 3) == full.flops(8, 3)


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
