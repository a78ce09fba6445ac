"""Looks for outputs that depend on what they must not see, and names the part, the layer and the offset.

Tokens are disturbed and outputs that move and must not are looked for, beside d logits_i / d embedding_j = 0
for j > i. A leak is then sought part by part: each is given its own inputs, disturbed only where they may be,
and the first whose output moves elsewhere is named.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sabrage.config import leaves
from sabrage.context import Context
from sabrage.model.lm import LM, ModelSpec
from sabrage.parts import Precision

# Rounding, as a share of the largest output, by the format of the products; beyond it an output has moved.
# Narrow formats include FP8, whose scale for a whole tensor moves every output a little in training.
ROUNDING = {"fp32": 2e-5, "tf32": 2e-3}
NARROW_ROUNDING = 5e-2
SMALLEST_BORDER = 64


def border_of(spec: ModelSpec) -> int:
    """The longest block that a part of a layer cuts time into, and never less than 64."""
    layers = (spec.mixers, spec.feedforwards)
    sizes = [size for path, size in leaves(layers) if "block" in path.rpartition(".")[2]]
    return max([SMALLEST_BORDER, *(size for size in sizes if isinstance(size, int))])


@dataclass(frozen=True)
class Disturbance:
    """Other tokens in `row` from position `start` on, named by `cause`; only `reach_BT` may move."""

    tokens_BT: Tensor
    reach_BT: Tensor
    row: int
    start: int
    cause: str

    def forbidden(self, *, same_row: bool) -> Tensor:
        """(B, T) outputs that must stay, in the disturbed row or in the others."""
        rows_B1 = torch.arange(len(self.reach_BT), device=self.reach_BT.device)[:, None]
        return ~self.reach_BT & ((rows_B1 == self.row) == same_row)


class Subject:
    """A model under examination: every run begins with the same random state and the same buffers.

    `window` and `layers` are the plan's. `largest` is the largest movement, as a share of the largest output,
    that was taken for rounding.
    """

    def __init__(
        self,
        model: LM,
        *,
        length: int,
        precision: Precision | None = None,
        window: int | None = None,
        layers: int | None = None,
    ) -> None:
        self.model, self.precision = model, precision
        self.window, self.layers = window, layers
        self.device = next(model.parameters()).device
        self.rounding = ROUNDING.get(precision.peak() if precision else "fp32", NARROW_ROUNDING)
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.largest = 0.0
        generator = torch.Generator().manual_seed(1)
        tokens_BT = torch.randint(model.spec.vocab_size, (2, length), generator=generator)
        self.tokens_BT = tokens_BT.to(self.device)
        self.border = min(border_of(model.spec), length - 1)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Every part but the wiring, with its name, in the order in which they work."""
        model, spec = self.model, self.model.spec
        yield f"embedding ({type(spec.embedding).__name__})", model.embedding
        block: Any
        for layer, block in enumerate(model.blocks):
            yield f"blocks.{layer}.mixer ({type(spec.mixer(layer)).__name__})", block.mixer
            yield f"blocks.{layer}.feedforward ({type(spec.feedforward(layer)).__name__})", block.feedforward
        yield f"head ({type(spec.head).__name__})", model.head

    @property
    def wiring(self) -> str:
        return f"wiring ({type(self.model.spec.wiring).__name__})"

    def restore(self) -> None:
        """Puts the buffers back as they were in the beginning."""
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), self.buffers, strict=True):
                buffer.copy_(value)

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """What runs inside draws the same random numbers each time and finds the same buffers."""
        self.restore()
        cards = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards):
            # torch.manual_seed would seed every CUDA device, also those that fork_rng does not restore.
            torch.default_generator.manual_seed(0)
            if cards:
                torch.cuda.manual_seed(0)
            with self.precision.autocast(self.device) if self.precision else nullcontext():
                yield

    def logits(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """The model's logits, (B, T, V)."""
        with self.repeatable(), torch.no_grad():
            context = Context(documents_BT=documents_BT, window=self.window, layers=self.layers)
            return self.model.logits(tokens_BT, context)

    def calls(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> dict[str, tuple[Any, Any]]:
        """What every part that is used is given in its first call, by the part's name."""
        seen: dict[str, tuple[Any, Any]] = {}

        def note(name: str, module: nn.Module, given: Any, named: Any) -> None:
            seen.setdefault(name, (given, named))

        handles = [
            module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            for name, module in self.parts()
        ]
        self.logits(tokens_BT, documents_BT)
        for handle in handles:
            handle.remove()
        return seen

    def moved(self, before_BTX: Tensor, after_BTX: Tensor, watch_BT: Tensor) -> list[list[int]]:
        """[b, t] of the watched outputs that moved by more than rounding, or are no numbers."""
        before, after = before_BTX.float(), after_BTX.float()
        far_BT = ((after - before).abs().flatten(2).amax(-1) / before.abs().max()).where(watch_BT, 0.0)
        stray = (~(far_BT <= self.rounding)).nonzero().tolist()
        self.largest = self.largest if stray else max(self.largest, far_BT.max().item())
        return stray


def disturbances(subject: Subject, documents_BT: Tensor | None = None) -> Iterator[Disturbance]:
    """Single tokens; then what crowds experts and pools: the rest of a row, and whole rows, of one token."""
    tokens_BT, border = subject.tokens_BT, subject.border
    vocab_size, length = subject.model.spec.vocab_size, tokens_BT.shape[1]
    time_T = torch.arange(length, device=tokens_BT.device)

    def make(row: int, start: int, end: int, value: Tensor, cause: str) -> Disturbance:
        changed_BT, reach_BT = tokens_BT.clone(), torch.zeros_like(tokens_BT, dtype=torch.bool)
        changed_BT[row, start:end] = value
        reach_BT[row] = time_T >= start
        if documents_BT is not None:
            reach_BT &= documents_BT == documents_BT[row, start]
        return Disturbance(changed_BT, reach_BT, row, start, cause)

    for t in dict.fromkeys((border - 1, border, min(border + 1, length - 1), 1, length - 1)):
        other = (tokens_BT[0, t] + max(1, vocab_size // 2)) % vocab_size
        yield make(0, t, t + 1, other, f"the input at {t}")
    if documents_BT is None:
        for t in (length // 4, length - 2):
            yield make(0, t, length, tokens_BT[0, t - 1], f"the inputs from {t} on")
        yield make(1, 0, length, tokens_BT[0], "all inputs")
        yield make(1, 0, length, tokens_BT[0, 0], "all inputs")
        yield make(0, 0, length, tokens_BT[1, 0], "all inputs")


def find_leaks(
    subject: Subject, reference_BTV: Tensor, documents_BT: Tensor | None = None
) -> tuple[str | None, str | None]:
    """Sentences about the first leak along time and the first between sequences."""
    found: dict[bool, str | None] = {True: None, False: None}
    for disturbance in disturbances(subject, documents_BT):
        after_BTV = subject.logits(disturbance.tokens_BT, documents_BT)
        for same_row in found:
            forbidden_BT = disturbance.forbidden(same_row=same_row)
            stray = subject.moved(reference_BTV, after_BTV, forbidden_BT)
            if stray and found[same_row] is None:
                found[same_row] = locate(subject, disturbance, stray, documents_BT, same_row=same_row)
    return found[True], found[False]


def locate(
    subject: Subject,
    disturbance: Disturbance,
    stray: list[list[int]],
    documents_BT: Tensor | None,
    *,
    same_row: bool,
) -> str:
    """Names the part whose own output moves where it must not; `stray` is where the logits did."""
    before = subject.calls(subject.tokens_BT, documents_BT)
    after = subject.calls(disturbance.tokens_BT, documents_BT)
    name = subject.wiring
    for part, module in subject.parts():
        if part not in before:
            continue
        given, named = before[part]
        spliced = [
            splice(old, new, disturbance.reach_BT) for old, new in zip(given, after[part][0], strict=True)
        ]
        with torch.no_grad():
            with subject.repeatable():
                old_BTX = module(*given, **named)
            with subject.repeatable():
                new_BTX = module(*spliced, **named)
        own = subject.moved(old_BTX, new_BTX, disturbance.forbidden(same_row=same_row))
        if own:
            name, stray = part, own
            break
    row, position = stray[0]
    if not same_row:
        return f"{name} leaks: the output of sequence {row} depends on sequence {disturbance.row}"
    offset = disturbance.start - position
    return f"{name} leaks: the output at {position} depends on {disturbance.cause} (offset {offset:+d})"


def splice(before: Any, after: Any, reach_BT: Tensor) -> Any:
    """`after` within reach and `before` elsewhere; what has no batch and time stays as it was before."""
    if not isinstance(before, Tensor) or before.shape[:2] != reach_BT.shape:
        return before
    return torch.where(reach_BT.view(*reach_BT.shape, *(1,) * (before.dim() - 2)), after, before)


def find_gradient_leak(subject: Subject) -> str | None:
    """A sentence about the first gradient that flows from an output to a later input or another sequence."""
    cut: list[Tensor] = []

    def detach(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        cut.append(output.detach().requires_grad_())
        return cut[-1]

    handle = subject.model.embedding.register_forward_hook(detach)
    with subject.repeatable():
        logits_BTV = subject.model.logits(subject.tokens_BT)
        handle.remove()
        sentence = backward_leak(logits_BTV, cut[0], subject.border)
    if sentence is None:
        return None
    for name, (given, named) in subject.calls(subject.tokens_BT).items():
        if given[0].is_floating_point():
            x_BTD = given[0].detach().requires_grad_()
            with subject.repeatable():
                output_BTX = dict(subject.parts())[name](x_BTD, *given[1:], **named)
                own = backward_leak(output_BTX, x_BTD, subject.border)
            if own is not None:
                return f"{name} leaks: {own}"
    return f"{subject.wiring} leaks: {sentence}"


def backward_leak(output_BTX: Tensor, input_BTD: Tensor, border: int) -> str | None:
    """What the outputs of sequence 0 up to a position depend on, later or elsewhere, by gradient; or None."""
    generator = torch.Generator().manual_seed(2)
    weight_X = torch.randn(output_BTX.shape[-1], generator=generator).to(output_BTX)
    for last in dict.fromkeys((max(border - 2, 0), max(border - 4, 0))):
        target = (output_BTX[0, : last + 1] * weight_X).sum()
        (gradient,) = torch.autograd.grad(target, input_BTD, retain_graph=True, allow_unused=True)
        if gradient is None:
            continue
        flows_BT = gradient.flatten(2).abs().amax(-1) != 0
        flows_BT[0, : last + 1] = False
        if flows_BT[0].any():
            j = int(flows_BT[0].nonzero().max())
            return f"the outputs up to {last} have a gradient to the input at {j} (offset {j - last:+d})"
        if flows_BT.any():
            return f"the outputs of sequence 0 have a gradient to sequence {int(flows_BT.nonzero()[0, 0])}"
    return None
