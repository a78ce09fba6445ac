"""A scale of the scores of one's own: what it does, and that the usual one changes nothing."""

import pytest
import torch

from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context


def outputs(part, x_BTD):
    torch.manual_seed(0)
    return part.build(dim=32, layer=0)(x_BTD, Context())


@pytest.mark.parametrize("kv_heads", [0, 1])
def test_the_usual_scale_is_the_default(kv_heads):
    x_BTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    plain, named = (
        MultiHead(heads=2, qk_norm=True, kv_heads=kv_heads, scale=scale) for scale in (None, 0.25)
    )
    torch.testing.assert_close(outputs(named, x_BTD), outputs(plain, x_BTD))


def test_scores_are_multiplied_by_it():
    x_BTD = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    part = MultiHead(heads=2, rotary=None, scale=0.7)
    torch.manual_seed(0)
    layer = part.build(dim=32, layer=0)
    q, k, v = (x.transpose(1, 2) for x in layer.project(x_BTD))
    scores = (0.7 * q @ k.transpose(2, 3)).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = layer.out((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x_BTD, Context()), expected)


def test_no_scale_is_told():
    assert any("scale=0" in problem for problem in MultiHead(heads=2, scale=0.0).problems())
