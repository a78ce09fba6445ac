"""The language model: tokens -> embedding -> wiring(blocks) -> head. Read this first, then train/loop.py."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sabrage.config import Part, leaves, walk
from sabrage.context import Context
from sabrage.model.depth import with_idle
from sabrage.parts import Embedding, FeedForward, Head, Mixer, Wiring


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Part):
    """What the model is made of.

    `mixers` and `feedforwards` are repeating per-layer patterns: layer l takes item l modulo their length.
    With `narrow_stream` the residual stream has the format of the products, where autocast has one narrower
    than fp32: half the traffic of norms, residuals and skips. What a `last` mixer makes of the normalised
    states h is added to them before the head: h + last(h).
    """

    layers: int
    dim: int
    vocab_size: int
    embedding: Embedding
    mixers: tuple[Mixer, ...]
    feedforwards: tuple[FeedForward, ...]
    wiring: Wiring
    head: Head
    narrow_stream: bool = False
    last: Mixer | None = None

    def problems(self) -> list[str]:
        found = [
            f"model.{name}={getattr(self, name)} must be at least 1"
            for name in ("layers", "dim", "vocab_size")
            if getattr(self, name) < 1
        ]
        for name in ("mixers", "feedforwards"):
            if not 1 <= len(getattr(self, name)) <= max(self.layers, 1):
                found.append(f"model.{name} has {len(getattr(self, name))} items, allowed: 1 to layers")
        valued = {layer % max(len(self.mixers), 1) for layer in self.wiring.value_layers(self.layers)}
        found += [
            f"model.mixers.{index} takes no values from model.wiring; use MultiHead with kv_heads=0, or "
            "another wiring"
            for index, mixer in enumerate(self.mixers)
            if index in valued and not mixer.takes_values()
        ]
        if self.wiring.takes_pairs() and not self.embedding.gives_pairs():
            found.append(
                "model.wiring asks for pairs of tokens and model.embedding hashes none; use BigramHash, or "
                "wiring.pairs=0"
            )
        return found or self.unbuildable()

    def unbuildable(self) -> list[str]:
        """Sentences about parts that cannot be built at this size; needs no memory."""
        ends = {"dim": self.dim, "vocab_size": self.vocab_size}
        parts: list[tuple[str, Any, dict[str, int]]] = [
            (f"{name}.{index}", part, {"dim": self.dim, "layer": index})
            for name in ("mixers", "feedforwards")
            for index, part in enumerate(getattr(self, name))
        ]
        parts += [("embedding", self.embedding, ends), ("head", self.head, ends)]
        if self.last:
            parts.append(("last", self.last, {"dim": self.dim, "layer": 0}))
        parts += [("wiring", self.wiring, ends | {"num_layers": self.layers})]
        found = []
        for name, part, size in parts:
            if any(piece.problems() for _, piece in walk(part)):
                continue
            try:
                with torch.device("meta"):
                    part.build(**size)
            except ValueError as error:
                found.append(f"model.{name}: {error}")
        return found

    def max_lengths(self) -> dict[str, int]:
        """Tokens of the longest sequence that parts can take, by the dotted paths of the fields."""
        return max_lengths(self, "model")

    def starts_silent(self) -> bool:
        """Whether a layer adds nothing before it has been trained."""
        return all(getattr(part, "zero_init", False) for part in (*self.mixers, *self.feedforwards))

    def mixer(self, layer: int) -> Mixer:
        return self.mixers[layer % len(self.mixers)]

    def feedforward(self, layer: int) -> FeedForward:
        return self.feedforwards[layer % len(self.feedforwards)]


def max_lengths(part: Part, path: str) -> dict[str, int]:
    """Tokens of the longest sequence that `part` and what is in it can take, by dotted paths from `path`."""
    return {name: n for name, n in leaves(part, path) if name.endswith(".max_length") and isinstance(n, int)}


class Block(nn.Module):
    """One layer's mixer and feed-forward; how they are joined is the wiring's business."""

    def __init__(self, mixer: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.mixer, self.feedforward = mixer, feedforward


class LM(nn.Module):
    """A causal language model, built on the CPU from `spec` with torch's global random state."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.head: Any
        self.embedding = spec.embedding.build(dim=spec.dim, vocab_size=spec.vocab_size)
        self.blocks = nn.ModuleList(
            Block(
                spec.mixer(layer).build(dim=spec.dim, layer=layer),
                spec.feedforward(layer).build(dim=spec.dim, layer=layer),
            )
            for layer in range(spec.layers)
        )
        self.wiring = spec.wiring.build(dim=spec.dim, num_layers=spec.layers, vocab_size=spec.vocab_size)
        # What it caches goes with layer 0, as what the embedding caches.
        self.last = spec.last.build(dim=spec.dim, layer=0) if spec.last else None
        # A tied head brings no weight of its own, so none is drawn for it.
        with torch.device("meta") if spec.head.tied else nullcontext():
            self.head = spec.head.build(dim=spec.dim, vocab_size=spec.vocab_size)
        if spec.head.tied:
            self.head.weight = self.embedding.weight
        elif spec.head.copied:
            with torch.no_grad():
                self.head.weight.copy_(self.embedding.weight)

    def forward(self, tokens_BT: Tensor, context: Context | None = None) -> Tensor:
        """Hidden states ready for the head, h_BTD."""
        context = context or Context()
        context.tokens_BT = tokens_BT
        x_BTD = self.embedding(tokens_BT, context)
        if self.spec.narrow_stream and torch.is_autocast_enabled(x_BTD.device.type):
            dtype = torch.get_autocast_dtype(x_BTD.device.type)
            x_BTD = x_BTD.to(dtype)
            context.pair_BTD = None if context.pair_BTD is None else context.pair_BTD.to(dtype)
        h_BTD = self.wiring(x_BTD, with_idle(self.blocks, context), context)
        if self.last is None:
            return h_BTD
        context.head_VD = self.head.weight
        return h_BTD + self.last(h_BTD, context)

    def logits(self, tokens_BT: Tensor, context: Context | None = None) -> Tensor:
        """Next-token logits at every position, (B, T, V)."""
        return self.head(self(tokens_BT, context))


def build_model(spec: ModelSpec, *, seed: int) -> LM:
    """The model with weights drawn from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device as well.
        torch.default_generator.manual_seed(seed)
        return LM(spec)
