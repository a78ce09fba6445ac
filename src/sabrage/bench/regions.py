"""The pieces of a training step, each alone: what a step gives to embedding, mixers, feed-forwards and head.

One forward pass of the model, not compiled, is listened to: a `Piece` is a module (or the attention inside a
mixer) with the very tensors that it was given there, so formats, strides, documents and windows are those of
the step. Layers that are built alike and are called alike are one piece with a count. A piece is then timed
as a graph of its own, forward and backward, with gradients of its inputs and weights.

Alone a piece neither shares a mask with other layers nor is fused with its neighbours, and its gradients are
not added to those of an earlier micro-batch; all of that is in what is left of the step.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sabrage.attention import backends
from sabrage.attention.none import NoMixer
from sabrage.bench.trial import Trial, Work, times
from sabrage.context import Context
from sabrage.parts import Batch, Knobs
from sabrage.train.step import compiled, micro_rows

# What one pass of a model leaves in its context; everything else in it was given.
LEFT_BEHIND = ("cache", "losses", "readings", "shared")
Function = Callable[..., tuple[Tensor, ...]]


@dataclass
class Piece:
    """`function(tensors, context)` with the tensors and context fields that it is called with.

    `count` layers are alike. `inner` is the attention inside a mixer, none for other kinds.
    """

    kind: str
    function: Function
    module: nn.Module
    tensors: tuple[Tensor, ...]
    context: dict[str, Any]
    count: int = 1
    inner: list["Piece"] = field(default_factory=list)

    def learning(self) -> list[Tensor]:
        """The tensors whose gradients a backward pass makes: inputs first, then weights."""
        given = [*self.tensors, *(value for value in self.context.values() if isinstance(value, Tensor))]
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        return [tensor for tensor in given if tensor.requires_grad] + weights


def kept(value: Any) -> Any:
    """A tensor as an input of its own, which learns where it holds fractions; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def given(context: Context) -> dict[str, Any]:
    """The fields of a context that its owner was given, tensors as inputs of their own."""
    names = [each.name for each in fields(context) if each.name not in LEFT_BEHIND]
    return {name: kept(getattr(context, name)) for name in names}


def called(module: nn.Module) -> Function:
    """A module as a function: its output, and the terms that it adds to the loss."""

    def run(tensors: tuple[Tensor, ...], context: dict[str, Any]) -> tuple[Tensor, ...]:
        own = Context(**context)
        output = module(*tensors, own)
        return output, *own.losses.values()

    return run


def attending(options: dict[str, Any]) -> Function:
    """`attend` with these options as a function of queries, keys and values."""

    def run(tensors: tuple[Tensor, ...], context: dict[str, Any]) -> tuple[Tensor, ...]:
        q, k, v = tensors
        return (backends.attend(q, k, v, Context(**context), **options),)

    return run


class Listener:
    """Notes the pieces of one forward pass of a model."""

    def __init__(self) -> None:
        self.pieces: dict[Any, Piece] = {}
        self.current: Piece | None = None

    def enter(self, kind: str, part: Any, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a module runs: (its tensors ..., context)."""
        *tensors, context = arguments
        held = given(context)
        weights = tuple((name, tuple(each.shape)) for name, each in module.named_parameters())
        alike = (kind, part, weights, *map(looks, tensors), *map(looks, held.values()))
        if alike in self.pieces:
            for piece in (self.pieces[alike], *self.pieces[alike].inner):
                piece.count += 1
            return
        self.current = Piece(kind, called(module), module, tuple(map(kept, tensors)), held)
        self.pieces[alike] = self.current

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.current = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, **options: Any) -> Tensor:
        """What mixers call in place of `attend`."""
        if self.current is not None:
            scores = nn.ModuleList(options.get("scores") or ())
            qkv = (kept(q), kept(k), kept(v))
            self.current.inner.append(Piece("attention", attending(options), scores, qkv, given(context)))
        return backends.attend(q, k, v, context, **options)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the place of `attend` in every module of the attention room that calls it."""
        rooms = [module for name, module in sys.modules.items() if name.startswith("sabrage.attention.")]
        users = [vars(room) for room in rooms if vars(room).get("attend") is backends.attend]
        users = [names for names in users if names is not vars(backends)]
        try:
            for names in users:
                names["attend"] = self.attend
            yield
        finally:
            for names in users:
                names["attend"] = backends.attend


def looks(value: Any) -> Any:
    """What a tensor is like without its numbers; any other value itself."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


@torch.no_grad()
def listen(trial: Trial, knobs: Knobs) -> tuple[list[Piece], int]:
    """The pieces of a micro-batch at these knobs, and how many micro-batches a step has."""
    batch, model, spec = trial.batch(knobs), trial.learner.model, trial.recipe.model
    rows = micro_rows(batch.tokens_BT.shape, trial.step.micro_tokens)
    micro = Batch(*(None if each is None else each[:rows] for each in vars(batch).values()))  # type: ignore[arg-type]
    listener = Listener()
    watched: list[tuple[str, Any, nn.Module]] = [("embedding", spec.embedding, model.embedding)]
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        if not isinstance(spec.mixer(layer), NoMixer):
            watched.append(("mixer", spec.mixer(layer), block.mixer))
        watched.append(("feedforward", spec.feedforward(layer), block.feedforward))
    if spec.last:
        watched.append(("mixer", spec.last, cast(nn.Module, model.last)))
    with ExitStack() as stack:
        stack.enter_context(listener.listening())
        for kind, part, module in watched:
            stack.callback(module.register_forward_pre_hook(partial(listener.enter, kind, part)).remove)
            stack.callback(module.register_forward_hook(listener.leave).remove)
        stack.enter_context(trial.recipe.precision.autocast(trial.device))
        context = Context(documents_BT=micro.documents_BT, window=knobs.window, layers=knobs.layers)
        h_BTD = model(micro.tokens_BT, context)
    pieces = [*listener.pieces.values(), head(trial, knobs, micro, h_BTD)]
    return pieces, len(batch.tokens_BT) // rows


def head(trial: Trial, knobs: Knobs, batch: Batch, h_BTD: Tensor) -> Piece:
    """The objective on the model's hidden states: the head's products, cross-entropy, and what it adds."""
    weights_W = torch.tensor(knobs.loss_weights, device=trial.device) if knobs.loss_weights else None
    learner = trial.learner

    def run(tensors: tuple[Tensor, ...], context: dict[str, Any]) -> tuple[Tensor, ...]:
        targets = Batch(context["tokens_BT"], context["targets_BT"], context["documents_BT"])
        return (learner.objective(tensors[0], targets, learner.model, context["weights_W"]).total,)

    return Piece("head", run, learner, (kept(h_BTD),), {**vars(batch), "weights_W": weights_W})


def milliseconds(piece: Piece, trial: Trial, *, flush: Tensor | None = None) -> float:
    """Time of one forward and backward pass of a piece."""
    torch.compiler.reset()
    return statistics.median(times(both_ways(piece, trial), trial.device, flush=flush))


def both_ways(piece: Piece, trial: Trial) -> Work:
    """What runs a piece forward and backward, which has run once."""
    precision, device = trial.recipe.precision, trial.device

    def forward(tensors: tuple[Tensor, ...], context: dict[str, Any]) -> tuple[Tensor, ...]:
        with precision.autocast(device):
            return piece.function(tensors, context)

    graph, learning = compiled(forward, trial.compiles), piece.learning()
    pulls: list[Tensor] = []

    def run() -> None:
        outputs = [output for output in graph(piece.tensors, piece.context) if output.requires_grad]
        if not pulls:
            # A loss is pulled by one, as in training.
            pulls.extend(torch.randn_like(each) if each.ndim else torch.ones_like(each) for each in outputs)
        torch.autograd.grad(outputs, learning, pulls, allow_unused=True)

    run()
    return run


def spent(trial: Trial, pieces: Sequence[Piece], micro_batches: int) -> dict[str, float | None]:
    """Milliseconds that a whole step gives to each kind of piece.

    "attention" is within "mixer", and None where a mixer attends by other means than `attend`.
    """
    flush = trial.flush()
    totals: dict[str, float | None] = {}
    for piece in [*pieces, *(inner for outer in pieces for inner in outer.inner)]:
        found = piece.count * micro_batches * milliseconds(piece, trial, flush=flush)
        totals[piece.kind] = (totals.get(piece.kind) or 0.0) + found
    if any(piece.kind == "mixer" and not piece.inner for piece in pieces):
        totals["attention"] = None
    return totals
