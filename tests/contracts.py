"""The contract of a language model, as checks that any test can run on any model or recipe.

`shrink(recipe)` makes a recipe tiny, `build(spec)` its model with noise on every weight, and `CONTRACT` holds
the checks by name: check(model) raises AssertionError where the property is broken. Comparisons are bit for
bit in fp32, save that decoding adds up in another order.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from sabrage.config import PartType, leaves, override
from sabrage.context import Context
from sabrage.data.embedded import EmbeddedText
from sabrage.generate.cache import DenseCache, streams_of
from sabrage.generate.paged import PAGE_SIZE, PagedCache
from sabrage.generate.pages import Sequence
from sabrage.model.lm import LM, ModelSpec, build_model
from sabrage.plan import Plan
from sabrage.precision.autocast import Fp32
from sabrage.recipe import Budget, Recipe

LENGTH = 64
# The sizes that a part's fields take in a tiny model, by the field's name; a new kind of size is added here.
TINY = {
    "heads": 2,
    "kv_heads": 1,
    "max_length": 128,
    "window": 24,
    "block": 16,
    "kv_rank": 24,
    "head_width": 32,
    "rows": 500,
    "period": 1,
    "tables": 1,
    "gates": 2,
    "columns": 100,
    "sample_tokens": 48,
}


def shrink(recipe: Recipe) -> Recipe:
    """The recipe with 2 layers (or one of every part), width 64, 257 tokens, 4 steps of 4 rows of 64."""
    model, objective = tiny(recipe.model), tiny(recipe.objective)
    layers = max(2, len(model.mixers), len(model.feedforwards))
    return replace(
        recipe,
        data=EmbeddedText(block_tokens=LENGTH),
        model=replace(model, layers=layers, dim=64, vocab_size=257),
        objective=objective,
        plan=Plan(
            steps=4,
            lr=recipe.plan.lr,
            tokens_per_step=4 * LENGTH,
            sequence_length=LENGTH,
            loss_weights=recipe.plan.loss_weights,
        ),
        precision=Fp32(),
        budget=Budget(evaluate_every=0, evaluation_tokens=512, evaluation_length=LENGTH),
        blend=recipe.blend and replace(recipe.blend, held_out=2048, steps=20, batch=256),
    )


def tiny(part: PartType) -> PartType:
    """The part with the sizes of TINY, where they are smaller."""
    for path, value in leaves(part):
        name = path.rpartition(".")[2]
        if name in TINY and isinstance(value, int):
            part = override(part, f"{path}={min(value, TINY[name])}")
    return part


def build(spec: ModelSpec) -> LM:
    """The model in evaluation mode, with noise on all weights: nothing hides behind a zero."""
    model = build_model(spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
    return model.eval()


def draw_tokens(model: LM, *, rows: int = 3) -> torch.Tensor:
    """(rows, LENGTH) tokens, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.spec.vocab_size, (rows, LENGTH), generator=generator)


def changed(model: LM, tokens_BT: torch.Tensor, where: object) -> torch.Tensor:
    """The tokens with others at `where`, an index."""
    other_BT = tokens_BT.clone()
    other_BT[where] = (tokens_BT[where] + model.spec.vocab_size // 2) % model.spec.vocab_size
    return other_BT


def seeded(model: LM, tokens_BT: torch.Tensor, *, seed: int = 0, training: bool = False) -> torch.Tensor:
    """Logits in either mode, with what a model draws at random, such as dropout, drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        logits_BTV = model.train(training).logits(tokens_BT)
    model.eval()
    return logits_BTV


@torch.no_grad()
def causal(model: LM) -> None:
    """Changing token t changes no output before t, in training neither."""
    tokens_BT = draw_tokens(model)
    for training in (False, True):
        before = seeded(model, tokens_BT, training=training)
        for t in (1, 7, 8, 31, 32, LENGTH - 1):
            other_BT = changed(model, tokens_BT, (slice(None), t))
            after = seeded(model, other_BT, training=training)
            assert torch.equal(after[:, :t], before[:, :t]), f"token {t} changes an output before it"
            assert not torch.equal(after[:, t], before[:, t]), f"token {t} changes nothing at all"


def causal_by_gradient(model: LM) -> None:
    """No output has a gradient with respect to a later token's vector."""
    tokens_BT = draw_tokens(model)
    vectors = []
    handle = model.embedding.register_forward_hook(lambda module, given, made: vectors.append(made))
    logits = model.logits(tokens_BT)
    handle.remove()
    generator = torch.Generator().manual_seed(3)
    for t in (0, 7, 8, 40, LENGTH - 1):
        pull = torch.randn(logits[:, t].shape, generator=generator)
        (gradient_BTD,) = torch.autograd.grad((logits[:, t] * pull).sum(), vectors, retain_graph=True)
        assert not gradient_BTD[:, t + 1 :].any(), f"output {t} depends on a later token"
        assert gradient_BTD[:, t].any(), f"output {t} does not depend on its own token"


@torch.no_grad()
def batch_independent(model: LM) -> None:
    """Other sequences in the batch change nothing, in training neither."""
    tokens_BT = draw_tokens(model)
    other_BT = changed(model, tokens_BT, slice(1, None))
    for training in (False, True):
        before, after = (seeded(model, x, training=training) for x in (tokens_BT, other_BT))
        assert torch.equal(before[0], after[0]), "a sequence depends on the others of its batch"
        assert not torch.equal(before[1], after[1])


@torch.no_grad()
def documents_isolated(model: LM) -> None:
    """Where documents are numbered, no token sees another document."""
    tokens_BT, border = draw_tokens(model), 23
    documents_BT = (torch.arange(LENGTH) >= border).long().expand_as(tokens_BT)
    other_BT = changed(model, tokens_BT, (slice(None), slice(0, border)))
    before, after = (model.logits(x, Context(documents_BT=documents_BT)) for x in (tokens_BT, other_BT))
    assert torch.equal(before[:, border:], after[:, border:]), "a token sees the document before its own"
    assert not torch.equal(before[:, :border], after[:, :border])


@torch.no_grad()
def decoding_equals_forward(model: LM) -> None:
    """A prefill, single tokens and a chunk of three through the cache give the logits of one whole pass."""
    tokens_BT = draw_tokens(model)
    whole = model.logits(tokens_BT)
    cache = DenseCache(model.spec, batch=len(tokens_BT), capacity=LENGTH)
    pieces = []
    for new_BT in tokens_BT.split([29, 1, 1, 1, 3, *[1] * (LENGTH - 35)], dim=1):
        length = new_BT.shape[1]
        positions_BT = torch.arange(cache.length, cache.length + length).expand_as(new_BT)
        pieces.append(model.logits(new_BT, Context(positions_BT=positions_BT, cache=cache)))
        cache.advance(length)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def paged_decoding_equals_forward(model: LM) -> None:
    """So do sequences of different lengths: in short pages, in those of kernels, in one large one each."""
    tokens_BT = draw_tokens(model)
    whole = model.logits(tokens_BT)
    for page_size in (8, PAGE_SIZE, 2 * PAGE_SIZE):
        cache = PagedCache(model.spec, num_pages=len(tokens_BT) * LENGTH // 8, page_size=page_size)
        view, rows = cache.view(rows=len(tokens_BT), max_length=LENGTH), [Sequence() for _ in tokens_BT]
        # Prompts of different lengths, a chunk, and steps in which rows end and one begins late.
        passes = [(29, 9, 0), (0, 7, 17), *[(1, 1, 1)] * 9, (3, 3, 0), *[(1, 0, 1)] * 3, (3, 3, 3)]
        for counts in passes:
            for sequence, count in zip(rows, counts, strict=True):
                cache.reserve(sequence, count)
            view.load(rows, counts)
            new_BT = torch.zeros(len(rows), max(counts), dtype=torch.int64)
            places = [slice(row.length, row.length + count) for row, count in zip(rows, counts, strict=True)]
            for row, place in enumerate(places):
                new_BT[row, : counts[row]] = tokens_BT[row, place]
            positions_BT = view.begin(new_BT.shape[1])
            logits_BTV = model.logits(new_BT, Context(positions_BT=positions_BT, cache=view))
            for row, place in enumerate(places):
                found = logits_BTV[row, : counts[row]]
                torch.testing.assert_close(found, whole[row, place], atol=1e-5, rtol=1e-5)
                rows[row].length += counts[row]


class CountingCache:
    """A dense cache that notes the shape of everything that it is given."""

    paged = False

    def __init__(self, model: LM, batch: int) -> None:
        self.dense = DenseCache(model.spec, batch=batch, capacity=LENGTH)
        self.shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def extend(self, layer: int, **streams_BTX: torch.Tensor) -> dict[str, torch.Tensor]:
        shapes = {name: tuple(stream.shape) for name, stream in streams_BTX.items()}
        self.shapes[layer] = self.shapes.get(layer, {}) | shapes
        return self.dense.extend(layer, **streams_BTX)


@torch.no_grad()
def caches_what_it_declares(model: LM) -> None:
    """The numbers cached per token and layer are those that the parts' streams declare."""
    tokens_BT = draw_tokens(model)
    cache = CountingCache(model, len(tokens_BT))
    positions_BT = torch.arange(LENGTH).expand_as(tokens_BT)
    model(tokens_BT, Context(positions_BT=positions_BT, cache=cache))
    spec = model.spec
    declared = {layer: streams_of(spec, layer) for layer in range(spec.layers)}
    assert cache.shapes == {
        layer: {name: (*tokens_BT.shape, width) for name, width in streams.items()}
        for layer, streams in declared.items()
        if streams
    }


@torch.no_grad()
def same_in_training(model: LM) -> None:
    """Evaluation draws nothing at random; a model that draws nothing in training computes the same there."""
    tokens_BT = draw_tokens(model)
    scored, again = (seeded(model, tokens_BT, seed=seed) for seed in (0, 1))
    trained, otherwise = (seeded(model, tokens_BT, seed=seed, training=True) for seed in (0, 1))
    assert torch.equal(scored, again), "evaluation is random"
    assert torch.equal(scored, trained) or not torch.equal(trained, otherwise), "training computes otherwise"


@torch.no_grad()
def normalised(model: LM) -> None:
    """The loss is that of a distribution over the vocabulary and nothing else."""
    tokens_BT, vocab_size = draw_tokens(model), model.spec.vocab_size
    h_BTD = model(tokens_BT)
    logits_BTV = model.head(h_BTD)
    assert logits_BTV.shape == (*tokens_BT.shape, vocab_size)
    every_V = torch.stack([model.head.loss(h_BTD[:1, -1:], torch.tensor([[v]])) for v in range(vocab_size)])
    torch.testing.assert_close((-every_V.double()).exp().sum().item(), 1.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(-every_V, logits_BTV[0, -1].log_softmax(-1), atol=1e-5, rtol=1e-5)


CONTRACT: dict[str, Callable[[LM], None]] = {
    check.__name__: check
    for check in (
        causal,
        causal_by_gradient,
        batch_independent,
        documents_isolated,
        decoding_equals_forward,
        paged_decoding_equals_forward,
        caches_what_it_declares,
        same_in_training,
        normalised,
    )
}
