"""Latent attention: the paper's formula, the absorbed form, what is cached, and the numbers that are told."""

import re
from dataclasses import replace

import pytest
import torch
from latent_pages import Paged

from sabrage.attention import latent
from sabrage.attention.latent import MultiHeadLatent
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.rotary import Rotary
from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.norms import rms_norm
from sabrage.optim.groups import assign
from sabrage.optim.muon import Muon
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts

DIM = 24
SMALL = {"heads": 3, "kv_rank": 10, "rotary_width": 4, "head_width": 6, "value_width": 5}
VARIANTS = [
    {},
    {"query_rank": 7},
    {"qk_norm": True, "window": 4},
    {"kv_rank": 40, "query_rank": 30, "qk_norm": True},
]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(dim=DIM, **changes):
    torch.manual_seed(0)
    return MultiHeadLatent(**SMALL | changes).build(dim=dim, layer=0)


class OneStream:
    """A dense cache of one layer whose stream is a list of what was appended."""

    paged = False

    def __init__(self):
        self.entries = []

    def extend(self, layer, latent):
        self.entries.append(latent)
        return {"latent": torch.cat(self.entries, dim=1)}


def formula(mixer, x_BTD, *, qk_norm=False, window=None, documents_BT=None):
    """The paper's equations, one head and one query at a time."""
    norm = rms_norm if qk_norm else lambda x: x
    x_query = x_BTD if mixer.query_down is None else rms_norm(mixer.query_down(x_BTD))
    latent_BTR = rms_norm(mixer.latent(x_BTD))
    shared_BTK = mixer.rotary(norm(mixer.rotary_key(x_BTD))[:, :, None])[:, :, 0]
    heads = mixer.heads
    outputs = []
    for head in range(heads):
        query, key, value = (
            layer.weight.chunk(heads)[head] for layer in (mixer.query, mixer.key, mixer.value)
        )
        q = norm(x_query @ query.T)
        turned = mixer.rotary(q[..., mixer.head_width :][:, :, None])[:, :, 0]
        q = torch.cat((q[..., : mixer.head_width], turned), -1)
        k = torch.cat((latent_BTR @ key.T, shared_BTK), -1)
        v = latent_BTR @ value.T
        rows = []
        for b in range(x_BTD.shape[0]):
            for t in range(x_BTD.shape[1]):
                first = 0 if window is None else max(0, t + 1 - window)
                seen = [
                    s
                    for s in range(first, t + 1)
                    if documents_BT is None or documents_BT[b, s] == documents_BT[b, t]
                ]
                scores = (k[b, seen] @ q[b, t]) / q.shape[-1] ** 0.5
                rows.append(scores.softmax(0) @ v[b, seen])
        outputs.append(torch.stack(rows).view(*x_BTD.shape[:2], -1))
    return mixer.out(torch.cat(outputs, -1))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_it_is_the_formula_of_the_paper(changes):
    mixer, x_BTD = build(**changes), draw(2, 9, DIM)
    options = {name: changes[name] for name in ("qk_norm", "window") if name in changes}
    torch.testing.assert_close(mixer(x_BTD, Context()), formula(mixer, x_BTD, **options), atol=1e-5, rtol=0)
    documents_BT = torch.tensor([[0] * 4 + [1] * 5, [2] * 8 + [3]])
    torch.testing.assert_close(
        mixer(x_BTD, Context(documents_BT=documents_BT)),
        formula(mixer, x_BTD, documents_BT=documents_BT, **options),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_absorbed_form_computes_what_the_expanded_form_does(changes):
    mixer = build(**changes).double()
    context = Context(positions_BT=torch.tensor([[5, 6, 7], [2, 3, 4]]), cache=OneStream())
    new_BTD, past_BTD = draw(2, 3, DIM).double(), draw(2, 8, DIM, seed=1).double()
    q_BTHK = mixer.queries(new_BTD, context)
    stream_BSX = mixer.compress(past_BTD, Context())
    forms = (form(q_BTHK, stream_BSX, context) for form in (mixer.absorbed, mixer.expanded))
    torch.testing.assert_close(*forms, atol=1e-12, rtol=0)


@pytest.mark.parametrize("absorbed_tokens", [0, 1, 2, float("inf"), None])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_prompt_in_chunks_and_single_tokens_equal_the_whole_pass(changes, absorbed_tokens):
    mixer, x_BTD = build(**changes), draw(2, 14, DIM)
    if absorbed_tokens is not None:
        mixer.absorbed_tokens = absorbed_tokens
    cache, pieces, start = OneStream(), [], 0
    for piece_BTD in x_BTD.split([5, 1, 1, 2, 4, 1], dim=1):
        end = start + piece_BTD.shape[1]
        positions_BT = torch.arange(start, end).expand(2, -1)
        pieces.append(mixer(piece_BTD, Context(positions_BT=positions_BT, cache=cache)))
        start = end
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x_BTD, Context()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kv_rank", "rotary_width"), [(512, 64), (256, 32), (192, 32)])
def test_the_latent_and_the_rotary_key_are_all_that_is_cached(kv_rank, rotary_width):
    part = MultiHeadLatent(heads=12, kv_rank=kv_rank, rotary_width=rotary_width)
    spec = replace(find("mla").model, mixers=(part,), layers=3)
    cache = DenseCache(spec, batch=2, capacity=7)
    assert cache.bytes() == 2 * 7 * 3 * (kv_rank + rotary_width) * 4
    mixer = part.build(dim=spec.dim, layer=1)
    context = Context(positions_BT=torch.arange(3).expand(2, -1), cache=cache)
    assert mixer(draw(2, 3, spec.dim), context).shape == (2, 3, spec.dim)


@pytest.mark.parametrize("changes", [{}, {"kv_rank": 64, "value_width": 16}])
def test_the_form_changes_where_the_other_costs_fewer_products(changes):
    mixer = build(**changes)
    rank, content, value = mixer.kv_rank, mixer.head_width, (SMALL | changes)["value_width"]

    def products(new_tokens, absorbed, keys=1000):
        """Multiplications of one head by new tokens and keys, but for what both forms do."""
        if absorbed:
            return new_tokens * keys * 2 * rank
        return keys * rank * (content + value) + new_tokens * keys * (content + value)

    few = int(mixer.absorbed_tokens)
    assert products(few, True) <= products(few, False)
    assert products(few + 1, True) > products(few + 1, False)


def test_a_latent_narrower_than_a_head_is_never_expanded():
    assert build(kv_rank=5).absorbed_tokens == float("inf")


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_count_every_weight_once_and_the_pairs_that_are_seen(changes):
    part = MultiHeadLatent(**SMALL | changes)
    weights = sum(parameter.numel() for parameter in build(**changes).parameters())
    length, window = 9, changes.get("window") or 9
    pairs = sum(min(t + 1, window) for t in range(length))
    widths = part.head_width + part.rotary_width + part.value_width
    assert part.flops(DIM, length) == 2 * weights + 2 * part.heads * widths * pairs // length


SETTINGS = {
    "`MultiHead(heads=12)`": MultiHead(heads=12),
    "`mla`": find("mla").model.mixers[0],
    "`mla-small`": find("mla-small").model.mixers[0],
    "as many parameters as `MultiHead`: kv_rank=601": MultiHeadLatent(heads=12, kv_rank=601),
    "caches as two key/value heads do: kv_rank=224": MultiHeadLatent(heads=12, kv_rank=224),
    "DeepSeek's kv_rank=512, rotary_width=64, head_width=64": MultiHeadLatent(
        heads=12, kv_rank=512, rotary_width=64, head_width=64
    ),
}


def test_the_table_of_settings_is_true():
    rows = re.findall(r"^\| (.*?) \| ([\d,]+) \| ([\d,]+) \|$", latent.__doc__, flags=re.MULTILINE)
    told = {
        name: (int(weights.replace(",", "")), int(floats.replace(",", ""))) for name, weights, floats in rows
    }
    with torch.device("meta"):
        assert told == {
            name: (
                sum(parameter.numel() for parameter in part.build(dim=768, layer=0).parameters()),
                sum(part.streams(768).values()),
            )
            for name, part in SETTINGS.items()
        }
    own, full = told["as many parameters as `MultiHead`: kv_rank=601"], told["`MultiHead(heads=12)`"]
    assert own[0] == pytest.approx(full[0], rel=1e-3)
    pairs = MultiHead(heads=12, kv_heads=2).streams(768)
    assert told["caches as two key/value heads do: kv_rank=224"][1] == sum(pairs.values())


def test_qk_norm_makes_the_scores_blind_to_the_size_of_queries_and_of_the_rotary_key():
    x_BTD, outputs = draw(2, 9, DIM), []
    for factor in (1.0, 7.0):
        mixer = build(qk_norm=True)
        with torch.no_grad():
            mixer.query.weight *= factor
            mixer.rotary_key.weight *= factor
        outputs.append(mixer(x_BTD, Context()))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_the_order_of_the_past_is_told_by_the_rotary_key_alone():
    mixer, x_BTD = build(), draw(1, 6, DIM)
    swapped_BTD = x_BTD[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(*(mixer(x, Context())[:, -1] for x in (x_BTD, swapped_BTD)))
    with torch.no_grad():
        mixer.rotary_key.weight.zero_()
    torch.testing.assert_close(*(mixer(x, Context())[:, -1] for x in (x_BTD, swapped_BTD)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_the_kernel_decodes_from_pages_what_the_gathered_cache_gives(changes):
    mixer, lengths, x_BTD = build(decode="triton", **changes), [70, 5, 0], draw(3, 72, DIM)
    past_BSX = mixer.compress(x_BTD, Context())
    cache = Paged(past_BSX, lengths)
    index_BT = torch.tensor(lengths)[:, None] + torch.arange(2)
    new_BTD = x_BTD.gather(1, index_BT[..., None].expand(-1, -1, DIM))
    got = mixer(new_BTD, Context(positions_BT=index_BT, cache=cache))
    whole_BTD = mixer(x_BTD, Context())
    expected = whole_BTD.gather(1, index_BT[..., None].expand(-1, -1, DIM))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert cache.lengths_B.tolist() == [72, 7, 2]


def test_pages_are_read_by_the_kernel_where_it_runs_and_gathered_elsewhere():
    part = MultiHeadLatent(heads=12)
    card = DeviceFacts(kind="cuda", name="card", memory=1, capability=(8, 6), triton="3.6", products="bf16")
    bare = replace(card, triton=None)
    assert (part.resolve(card).decode, part.resolve(bare).decode) == ("triton", "plain")
    assert part.resolve(card).backend == "flash"
    assert part.resolve(replace(card, documents=True)).backend != "flash"
    named = replace(part, decode="triton")
    assert named.refusal(card) is None
    assert "needs an NVIDIA card" in named.refusal(bare)
    assert "takes heads of width 256 at most" in replace(part, head_width=300, backend="flash").refusal(card)


def test_a_zero_initialised_mixer_adds_nothing_and_can_learn():
    mixer = build(zero_init=True)
    y_BTD = mixer(draw(1, 5, DIM), Context())
    assert not y_BTD.any()
    y_BTD.sum().backward()
    assert mixer.out.weight.grad.any()


def test_all_its_matrices_go_to_muon_one_by_one():
    recipe = find("mla")
    mixer = MultiHeadLatent(heads=12, query_rank=96).build(dim=768, layer=0)
    named = [(f"model.blocks.0.mixer.{name}", weight) for name, weight in mixer.named_parameters()]
    taken = assign(recipe.optim[:1], named)
    assert isinstance(taken[0][0].optimizer, Muon)
    assert taken[0][1] == named
    assert len(named) == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rotary_width": 7}, "rotary_width=7 must be even"),
        ({"rotary_width": 0}, "rotary_width=0 must be even and at least 2"),
        ({"kv_rank": 0}, "kv_rank=0 must be at least 1"),
        ({"query_rank": 0}, "query_rank=0 must be at least 1"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
    ],
)
def test_sizes_without_meaning_are_problems(changes, said):
    (sentence,) = MultiHeadLatent(**SMALL | changes).problems()
    assert said in sentence
    assert MultiHeadLatent(**SMALL).problems() == []


def test_a_sequence_beyond_the_rotary_tables_is_refused():
    mixer = build(rotary=Rotary(max_length=4))
    with pytest.raises(ValueError, match=r"raise rotary.max_length"):
        mixer(draw(1, 5, DIM), Context())
