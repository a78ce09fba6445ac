"""Keys whose standing part is that of the token before."""

import torch

from sabrage.attention.key_offset import offset_keys
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.rotary import Rotary
from sabrage.context import Context


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_standing_part_is_the_one_before_but_for_first_tokens():
    k_BSGK, documents_BT = draw(2, 6, 3, 8), torch.tensor([[0, 0, 0, 1, 1, 1], [5, 5, 2, 2, 2, 5]])
    # Of four pairs the first turns: numbers 0 and 4.
    turning = torch.tensor([True, False, False, False] * 2)
    for context, firsts in (
        (Context(), ({0}, {0})),
        (Context(documents_BT=documents_BT), ({0, 3}, {0, 2, 5})),
    ):
        found = offset_keys(k_BSGK, context, turning=1)
        for b, first in enumerate(firsts):
            for s in range(6):
                before = k_BSGK[b, s if s in first else s - 1]
                assert torch.equal(found[b, s], torch.where(turning, k_BSGK[b, s], before))


def test_the_numbers_that_are_shifted_are_those_that_rotary_positions_leave_alone():
    part = Rotary(share=0.5, max_length=32)
    k_BSGK = draw(1, 9, 2, 8)
    turned = part.build(8)(k_BSGK)
    standing = (turned == k_BSGK)[:, 1:].all(0).all(0).all(0)
    shifted = offset_keys(turned, Context(), turning=part.turning(8))
    assert torch.equal(shifted[..., ~standing], turned[..., ~standing])
    assert torch.equal(shifted[:, 1:, :, standing], k_BSGK[:, :-1, :, standing])
    assert standing.sum() == 4


def test_a_query_for_its_own_token_finds_the_one_after_it():
    """Induction in one layer: A B C A asks for A and gets B."""
    tokens_S = torch.tensor([0, 1, 2, 0])
    # Four pairs that turn, zero here, and four that stand: number i + 4 of each half.
    standing_SX = torch.nn.functional.one_hot(tokens_S, 4).float()
    nothing_SX = torch.zeros(4, 4)
    k_BSGK = torch.cat((nothing_SX, standing_SX, nothing_SX, nothing_SX), dim=1)[None, :, None]
    last_K = k_BSGK[0, -1, 0]
    for keys, found in ((k_BSGK, [0, 3]), (offset_keys(k_BSGK, Context(), turning=4), [0, 1])):
        scores_S = keys[0, :, 0] @ last_K
        assert scores_S.nonzero().flatten().tolist() == found


def test_a_layer_without_documents_sees_across_them_and_one_with_them_does_not():
    layer = MultiHead(heads=2, rotary=Rotary(share=0.5), key_offset=True).build(dim=16, layer=0)
    x_BTD, documents_BT = draw(1, 6, 16), torch.tensor([[0, 0, 0, 1, 1, 1]])
    whole = layer(x_BTD, Context(documents_BT=documents_BT))
    torch.testing.assert_close(
        whole[:, 3:], layer(x_BTD[:, 3:], Context(positions_BT=torch.arange(3, 6)[None]))
    )
    assert not torch.allclose(whole[:, 3:], layer(x_BTD, Context())[:, 3:])
