"""Multi-head attention reads a paged cache where it lies, and computes what it computes from a dense one."""

import pytest
import torch
from contracts import build, draw_tokens, shrink

from sabrage.attention.multi_head import MultiHeadAttention
from sabrage.context import Context
from sabrage.generate.paged import PagedCache
from sabrage.generate.pages import Sequence
from sabrage.recipes import find


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["base", "gqa", "attention-gate", "attention-scale", "exclusive-self", "partial-rotary"]
)
def test_the_kernel_over_pages_continues_the_forward_pass(name, monkeypatch, one_thread):
    model, asked = build(shrink(find(name)).model), []

    def few(mixer, q_BTHK, cache):
        asked.append(q_BTHK.shape[1])
        return cache.paged and q_BTHK.shape[1] <= 2

    monkeypatch.setattr(MultiHeadAttention, "reads_pages", few)
    tokens_BT = draw_tokens(model, rows=2)[:, :34]
    whole = model.logits(tokens_BT)
    cache = PagedCache(model.spec, num_pages=2)
    rows, view = [Sequence(), Sequence()], cache.view(rows=2, max_length=64)
    # The second row begins later than the first, and stands idle in the last pass.
    for counts in ((30, 0), (0, 31), (1, 1), (2, 2), (1, 0)):
        for sequence, count in zip(rows, counts, strict=True):
            cache.reserve(sequence, count)
        view.load(rows, counts)
        new_BT = torch.zeros(2, max(counts), dtype=torch.int64)
        for row, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
            new_BT[row, :count] = tokens_BT[row, sequence.length : sequence.length + count]
        context = Context(positions_BT=view.begin(max(counts)), cache=view)
        logits_BTV = model.logits(new_BT, context)
        for row, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
            expected = whole[row, sequence.length : sequence.length + count]
            torch.testing.assert_close(logits_BTV[row, :count], expected, atol=1e-5, rtol=1e-5)
            sequence.length += count
    assert asked.count(1) == asked.count(2) * 2 > 0


def test_on_a_cpu_and_in_32_bits_pages_are_gathered():
    model = build(shrink(find("base")).model)
    cache = PagedCache(model.spec, num_pages=1)
    view = cache.view(rows=1, max_length=64)
    for dtype in (torch.float32, torch.bfloat16):
        assert not model.blocks[0].mixer.reads_pages(torch.zeros(1, 1, 2, 32, dtype=dtype), view)
