"""Value embeddings reach the mixers that ask for them, gated, and start as nothing."""

from dataclasses import dataclass, replace

import pytest
import torch
from contracts import CONTRACT, build, draw_tokens, shrink
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from sabrage.attention.none import NoMixer
from sabrage.context import Context
from sabrage.model.lm import build_model
from sabrage.model.previous import BigramHash, Smear, TrigramHash
from sabrage.norms import rms_norm
from sabrage.parts import Mixer
from sabrage.recipes import find
from sabrage.wiring.residual import Residual
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skipping
from sabrage.wiring.value_embeddings import ValueEmbeddings


@dataclass(frozen=True, kw_only=True)
class SumOfValues(Mixer):
    """The sum of the values so far in the document, a value being the input and what the context adds."""

    def build(self, *, dim, layer):
        return Sum(layer)

    def streams(self, dim):
        return {"value": dim}

    def flops(self, dim, sequence_length):
        return 0

    def takes_values(self):
        return True


class Sum(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD, context):
        v_BSD = x_BTD if context.values_BTD is None else x_BTD + context.values_BTD
        if context.cache is not None:
            v_BSD = context.cache.extend(self.layer, value=v_BSD)["value"]
        length = v_BSD.shape[1]
        mask_BTS = torch.ones(length, length).tril()[None]
        if context.cache is not None:
            mask_BTS = mask_BTS[0][context.positions_BT]
        if context.documents_BT is not None:
            mask_BTS = mask_BTS * (context.documents_BT[:, :, None] == context.documents_BT[:, None])
        return mask_BTS @ v_BSD / 64


def spec(wiring, *, layers=4):
    return replace(shrink(find("nocap")).model, layers=layers, mixers=(SumOfValues(),), wiring=wiring)


INNER = Skipping(residual=Residual(mixer_scale="depth"), skips=(SkipScales(),))


@pytest.mark.parametrize("inner", [Residual(), INNER])
def test_value_embeddings_start_as_the_wiring_they_wrap_bit_for_bit(inner):
    plain, valued = (
        build_model(spec(wiring), seed=0)
        for wiring in (inner, ValueEmbeddings(inner=inner, tables=2, gates=4))
    )
    tokens_BT = draw_tokens(plain)
    logits = valued.logits(tokens_BT)
    assert torch.equal(logits, plain.logits(tokens_BT))
    logits.square().sum().backward()
    assert all(table.grad.any() for table in valued.wiring.tables)


def test_a_layer_with_a_table_adds_the_tokens_row_gated_by_its_own_input():
    wiring = ValueEmbeddings(tables=1, gates=4)
    model, plain = build(spec(wiring, layers=2)), spec(Residual(), layers=2)
    tokens_BT, seen = draw_tokens(model), []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(
            lambda module, given: seen.append((given[0], given[1].values_BTD))
        )
    context = Context()
    model(tokens_BT, context)
    assert context.values_BTD is None, "nothing is left for whoever comes after"
    first_x_BTD, first_BTD = seen[0]
    torch.testing.assert_close(first_x_BTD, rms_norm(model.embedding.weight[tokens_BT]))
    gates_BTH = 2 * torch.sigmoid(first_x_BTD[..., :12] @ model.wiring.gates["0"].T)
    expected = model.wiring.tables[0][tokens_BT] * gates_BTH.repeat_interleave(16, dim=-1)
    torch.testing.assert_close(first_BTD, expected)
    assert len(build_model(plain, seed=0).state_dict()) < len(model.state_dict())


@pytest.mark.parametrize(
    ("tables", "layers", "expected"),
    [(1, 2, {0: 0, 1: 0}), (3, 12, {0: 0, 1: 1, 2: 2, 9: 0, 10: 1, 11: 2}), (2, 5, {0: 0, 1: 1, 3: 0, 4: 1})],
)
def test_the_first_layers_and_the_last_share_the_tables(tables, layers, expected):
    assert ValueEmbeddings(tables=tables).layers(layers) == expected
    model = build_model(spec(ValueEmbeddings(tables=tables, gates=1), layers=layers), seed=0)
    with_values = []
    for layer, block in enumerate(model.blocks):
        block.mixer.register_forward_pre_hook(
            lambda module, given, layer=layer: (
                with_values.append(layer) if given[1].values_BTD is not None else None
            )
        )
    model(draw_tokens(model))
    assert with_values == sorted(expected)


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("pairs", [0, 30])
def test_a_model_with_value_embeddings_keeps_the_contract(check, pairs):
    wiring = ValueEmbeddings(inner=INNER, tables=1, gates=4, pairs=pairs)
    CONTRACT[check](build(replace(spec(wiring, layers=3), embedding=BigramHash(rows=20))))


def paired(**changes):
    """A model of two tables, the first with pairs, and what its mixers get and are told to add."""
    model = build(replace(spec(ValueEmbeddings(tables=2, gates=4, **changes)), embedding=BigramHash(rows=20)))
    seen = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(
            lambda module, given: seen.append((given[0], given[1].values_BTD))
        )
    return model, seen


def test_the_layers_of_the_first_table_add_a_row_of_their_pair_as_well_with_gates_of_its_own():
    (model, seen), tokens_BT = paired(pairs=30), torch.tensor([[7, 3, 1, 9, 3, 1]])
    model(tokens_BT, context := Context())
    hash_BT = context.pairs_BT
    assert hash_BT[0, 2] == hash_BT[0, 5]
    assert len(hash_BT.unique()) == 5
    table_RD = model.wiring.pairs_RD
    for layer, (x_BTD, found_BTD) in enumerate(seen):
        gate_BTH = 2 * torch.sigmoid(x_BTD[..., :12] @ model.wiring.gates[str(layer)].T)
        token_BTD = model.wiring.tables[layer % 2][tokens_BT] * gate_BTH.repeat_interleave(16, dim=-1)
        left_BTD = found_BTD - token_BTD
        if layer % 2:
            torch.testing.assert_close(left_BTD, torch.zeros_like(left_BTD), atol=1e-5, rtol=0)
            continue
        gate_BTH = 2 * torch.sigmoid(x_BTD[..., :12] @ model.wiring.pair_gates[str(layer)].T)
        sizes_BTD = (left_BTD / gate_BTH.repeat_interleave(16, dim=-1)).abs()
        torch.testing.assert_close(sizes_BTD, table_RD[hash_BT % 30].abs(), atol=1e-4, rtol=1e-3)
    assert sorted(model.wiring.pair_gates) == ["0", "2"]


def test_values_of_pairs_start_as_nothing_and_learn():
    embedding = BigramHash(rows=20)
    plain, valued = (
        build_model(replace(spec(ValueEmbeddings(tables=1, gates=4, pairs=n)), embedding=embedding), seed=0)
        for n in (0, 30)
    )
    tokens_BT = draw_tokens(plain)
    logits = valued.logits(tokens_BT)
    assert torch.equal(logits, plain.logits(tokens_BT))
    logits.square().sum().backward()
    assert valued.wiring.pairs_RD.grad.any()


def test_values_of_pairs_need_an_embedding_that_hashes_them():
    wiring = ValueEmbeddings(tables=1, gates=4, pairs=30)
    plain = replace(shrink(find("base")).model, wiring=wiring)
    assert any("model.embedding hashes none; use BigramHash" in problem for problem in plain.problems())
    for embedding in (Smear(inner=BigramHash(rows=20)), TrigramHash(inner=BigramHash(rows=20), rows=20)):
        assert replace(plain, embedding=embedding).problems() == []
    assert replace(plain, embedding=TrigramHash(rows=20)).problems()
    assert ValueEmbeddings(pairs=-1).problems()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (ValueEmbeddings(tables=3, gates=1), "use 2 or fewer"),
        (ValueEmbeddings(tables=1, gates=7), "gates=7 does not"),
    ],
)
def test_tables_and_gates_that_do_not_fit_are_refused(part, said):
    with pytest.raises(ValueError, match=said):
        part.build(dim=64, num_layers=4, vocab_size=5)


def test_mixers_that_take_no_values_are_refused_by_name():
    wiring = ValueEmbeddings(tables=1, gates=4)
    shared = replace(shrink(find("gqa")).model, wiring=wiring)
    assert any(problem.startswith("model.mixers.0 takes no values") for problem in shared.problems())
    plain = replace(shrink(find("base")).model, wiring=wiring)
    assert plain.problems() == []


def test_only_layers_that_get_values_must_take_them():
    wiring = ValueEmbeddings(tables=1, gates=4)
    one = shrink(find("base")).model
    middle = replace(one, layers=5, mixers=(*one.mixers * 2, NoMixer(), *one.mixers * 2), wiring=wiring)
    assert middle.problems() == []
    last = replace(one, layers=5, mixers=(*one.mixers * 4, NoMixer()), wiring=wiring)
    [problem] = last.problems()
    assert problem.startswith("model.mixers.4 takes no values")
    # The pattern repeats: its second item is also the last layer's.
    again = replace(one, layers=4, mixers=(*one.mixers, NoMixer()), wiring=wiring)
    [problem] = again.problems()
    assert problem.startswith("model.mixers.1 takes no values")


def test_both_layers_of_a_table_make_its_gradient_at_once(one_thread):
    """A gradient as large as the table is filled with zeros and added to another one for each lookup."""
    made = []

    def count(graph, _):
        made.extend(node for node in graph.graph.nodes if "embedding_dense_backward" in str(node.target))
        return graph.forward

    model = build_model(spec(ValueEmbeddings(tables=2, gates=4)), seed=0)
    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=count)
    torch.compile(model, backend=backend)(draw_tokens(model)).sum().backward()
    # The table at the input, and one for each pair of layers.
    assert len(made) == 1 + 2
