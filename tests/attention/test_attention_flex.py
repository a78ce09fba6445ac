"""FlexAttention: the same numbers as the reference, blocks that miss no pair, and one graph."""

import pytest
import torch
from attention_cases import CASES, DOCUMENTS, Case, two_layers_with_flex

from sabrage.attention import flex as module
from sabrage.attention.backends import attend
from sabrage.attention.flex import BLOCK, block_mask, flex, little_memory, seen_blocks
from sabrage.attention.masks import visible
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.scores import RelativeBias
from sabrage.context import Context

# A backward pass of FlexAttention needs CUDA; the tests for it hold it to every case.
NAMES = ("one token", "whole blocks", "grouped", "wide values", "documents and window", "window of blocks",
         "alibi of six heads in a window", "learned bias and documents", "soft cap over alibi")  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
@torch.no_grad()
def test_flex_equals_plain(case):
    q, k, v, _ = case.inputs()
    plain, flexible = (
        attend(q, k, v, case.context(), backend=backend, window=case.window, scores=case.modules())
        for backend in ("plain", "flex")
    )
    torch.testing.assert_close(flexible, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_flex_takes_a_mask_that_is_given(rows):
    q, k, v, _ = Case("", queries=140, keys=150, groups=2).inputs()
    mask_BTS = torch.rand(rows, 140, 150, generator=torch.Generator().manual_seed(4)) > 0.9
    mask_BTS[..., 0] = True
    plain, flexible = (
        attend(q, k, v, Context(), backend=backend, mask_BTS=mask_BTS) for backend in ("plain", "flex")
    )
    torch.testing.assert_close(flexible, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("documents", ["none", "packed", "any order"])
@pytest.mark.parametrize("length", [1, 128, 500])
def test_no_pair_that_is_seen_lies_outside_the_blocks_and_none_that_is_not_within_a_whole_one(
    length, documents, window
):
    documents_BT = {
        "none": None,
        "packed": torch.tensor([[0, 0, 1, 1, 1] * 100, [7] * 500]).sort().values[:, :length],
        "any order": torch.arange(1000).view(2, 500)[:, :length] // 70 * 5 % 4,
    }[documents]
    some, whole = seen_blocks(length, window, documents_BT, CPU)
    mask = visible(Context(documents_BT=documents_BT), length, CPU, window=window)[:, 0]
    missing = -length % BLOCK
    padded = torch.nn.functional.pad(mask, (0, missing, 0, missing))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).transpose(2, 3).flatten(3)
    assert not (blocks.any(-1) & ~some[:, 0]).any()
    assert not (whole[:, 0] & ~blocks.all(-1)).any()
    if documents != "any order":
        # There nothing is asked or visited in vain.
        assert torch.equal(blocks.all(-1).expand_as(whole[:, 0]), whole[:, 0].expand_as(blocks.all(-1)))
        assert torch.equal(blocks.any(-1), some[:, 0].expand_as(blocks.any(-1)))


def test_far_blocks_are_skipped():
    causal = block_mask(1024, None, Context(), CPU)
    windowed = block_mask(1024, 128, Context(), CPU)
    counts = [mask.kv_num_blocks + mask.full_kv_num_blocks for mask in (causal, windowed)]
    assert counts[0].flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert counts[1].flatten().tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert causal.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@torch.no_grad()
def test_a_model_with_flex_is_one_graph_that_makes_each_mask_once():
    part = MultiHead(heads=4, kv_heads=2, window=40, scores=(RelativeBias(),))
    x_BTD = torch.randn(2, 217, 32, generator=torch.Generator().manual_seed(0))
    found, expected, graphs = two_layers_with_flex(
        part, x_BTD, prepare=lambda layer: torch.nn.init.normal_(layer.scores[0].bias_HN)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    code = graphs[0].code
    assert code.count("flex_attention(") == 2
    assert code.count("sabrage.document_blocks") == 1
    assert code.count("argsort(") == 2, "the transposes of the lists of blocks seen in part and as a whole"


def test_the_mask_functions_agree_with_the_mask_in_full():
    context = Case("", documents=DOCUMENTS).context()
    mask = block_mask(217, 40, context, CPU)
    batch, query, key = torch.arange(2)[:, None, None], torch.arange(217)[:, None], torch.arange(217)
    expected = visible(context, 217, CPU, window=40)[:, 0]
    assert torch.equal(mask.mask_mod(batch, torch.tensor(0), query, key), expected)


def test_small_memory_is_that_of_the_device(monkeypatch):
    class Card:
        shared_memory_per_block_optin = 99 * 1024

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert little_memory(torch.device("cuda"))
    Card.shared_memory_per_block_optin = 227 * 1024
    assert not little_memory(torch.device("cuda"))
    assert not little_memory(CPU)


@pytest.mark.parametrize(("width", "tiles"), [(128, 1), (64, 0)])
@torch.no_grad()
def test_wide_heads_on_cards_with_little_shared_memory_get_small_tiles_in_one_graph(
    width, tiles, monkeypatch
):
    monkeypatch.setattr(module, "little_memory", torch.compiler.assume_constant_result(lambda device: True))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x_BHTK = torch.randn(1, 2, 200, width)
    torch.compile(
        lambda x: flex(x, x, x, Context(), window=None, scores=(), mask_BTS=None),
        fullgraph=True,
        dynamic=False,
        backend=keep,
    )(x_BHTK)
    assert [graph.code.count("'fwd_BLOCK_M': 64") for graph in graphs] == [tiles]


def test_flex_refuses_to_learn_on_the_cpu_rather_than_learn_nothing():
    q, k, v, _ = Case("").inputs()
    heads_first = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="CPU"):
        flex(*heads_first, Context(), window=None, scores=(), mask_BTS=None)
