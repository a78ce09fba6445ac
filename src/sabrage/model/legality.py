"""Is a model legal: does what it says about a token depend on that token's past alone?

The property, for every position i: logits_i = f(tokens_0 .. tokens_i) of the same sequence, in train mode and
in eval mode, and the loss is the cross-entropy of softmax(logits_i) over the whole vocabulary.
"""

import dataclasses
import itertools
import typing
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.config import ConfigError, Part, resolve
from sabrage.model.leaks import Subject, border_of, find_gradient_leak, find_leaks
from sabrage.model.lm import LM, ModelSpec, build_model
from sabrage.parts import Precision
from sabrage.run.device import one_thread, probe

SMALL_WIDTH, SMALL_VOCABULARY = 64, 512


@dataclass(frozen=True)
class Check:
    """One property: whether it holds, and what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Legality:
    """The verdict on a model."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def require(self) -> Self:
        """The verdict itself when all is well. Raises ConfigError with every failure."""
        failures = [f"  - {check.name}: {check.detail}" for check in self.checks if not check.passed]
        if failures:
            raise ConfigError("\n".join(["the model is not legal; mend the part that is named:", *failures]))
        return self

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [dataclasses.asdict(check) for check in self.checks]}


@one_thread()
def quick(
    spec: ModelSpec,
    *,
    max_length: int,
    documents: bool = False,
    window: int | None = None,
    layers: int | None = None,
) -> Legality:
    """`examine` for a shrunken copy with random weights, in fp32 on the CPU: about a second.

    `max_length` is the longest row that the model is ever given; a `window` is narrowed until it hides
    something of the short rows, and active `layers` lessened until one of the few is idle. The random state
    is left as it was.
    """
    model = scramble(build_model(shrink(spec), seed=0))
    length = min(border_of(spec) + 8, max_length)
    window = None if window is None else min(window, length // 2)
    layers = None if layers is None else max(min(layers, model.spec.layers - 1), 1)
    return examine(model, length=length, documents=documents, window=window, layers=layers)


def shrink(spec: ModelSpec) -> ModelSpec:
    """A narrow copy with few tokens and the fewest layers, at least two, that hold one of every part.

    The width is a quarter, a half or all of the model's, the first that every part can be built at. Whatever
    may be left to the device is decided for a CPU.
    """
    small = automatic(replace(spec, vocab_size=min(spec.vocab_size, SMALL_VOCABULARY)))
    small = resolve(small, replace(probe("cpu"), products="fp32"))
    least = min(max(2, len(spec.mixers), len(spec.feedforwards)), spec.layers)
    widths = [*(spec.dim // part for part in (4, 2) if spec.dim // part >= SMALL_WIDTH), spec.dim]
    sizes = itertools.product(widths, range(least, spec.layers + 1))
    copies = (replace(small, dim=dim, layers=layers) for dim, layers in sizes)
    return next((copy for copy in copies if not copy.problems()), small)


def automatic(value: Any) -> Any:
    """The tree with "auto" in every field that allows it."""
    if isinstance(value, tuple):
        return tuple(automatic(item) for item in value)
    if not isinstance(value, Part):
        return value
    hints = typing.get_type_hints(type(value))
    changes = {
        field.name: "auto"
        if "auto" in typing.get_args(hints[field.name])
        else automatic(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }
    return replace(value, **changes)


def scramble(model: LM) -> LM:
    """The model with noise on all weights, so that nothing hides behind what starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight), alpha=scale)
    return model


def examine(
    model: LM,
    *,
    length: int,
    precision: Precision | None = None,
    documents: bool = False,
    window: int | None = None,
    layers: int | None = None,
) -> Legality:
    """Tries every property on two sequences of `length` (at least 2) random tokens, on the model's device.

    `precision` is that of the matrix products (None: fp32); with `documents` the model claims to keep the
    documents of a row apart; `window` and `layers` are the plan's. Weights, mode, buffers and random state
    are left as they were.
    """
    subject = Subject(model, length=max(length, 2), precision=precision, window=window, layers=layers)
    was_training = model.training
    leaks: dict[str, list[str | None]] = {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        for name, leak in leaks_of(subject, documents=documents).items():
            leaks.setdefault(name, []).append(leak and f"{mode} mode: {leak}")
    rounding = subject.largest
    model.eval()
    leaks["normalisation"] = [unnormalised(subject)]
    leaks["evaluation length"] = [length_dependence(subject)]
    leaks["evaluation leaves no trace"] = [trace_of_evaluation(subject)]
    model.train(was_training)
    subject.restore()
    bits = "bit for bit" if rounding == 0 else f"up to rounding ({rounding:.0e} of the largest)"
    shown = {
        "causality": f"no earlier output moves, {bits}",
        "causality by gradient": "no gradient reaches a later input",
        "batch independence": f"no output of another sequence moves, {bits}",
        "document isolation": "no output of another document moves",
        "normalisation": f"the loss is that of a softmax over {model.spec.vocab_size} tokens",
        "evaluation length": "a shorter row has the same first outputs",
        "evaluation leaves no trace": "no buffer and no output changes by evaluating",
    }
    first = {name: next((leak for leak in found if leak), None) for name, found in leaks.items()}
    return Legality(tuple(Check(name, leak is None, leak or shown[name]) for name, leak in first.items()))


def leaks_of(subject: Subject, *, documents: bool) -> dict[str, str | None]:
    """What leaks in the model's present mode, by the name of the check; None where nothing does."""
    reference_BTV = subject.logits(subject.tokens_BT)
    if not reference_BTV.isfinite().all():
        return {"causality": "the logits are not finite numbers, so nothing can be said"}
    along_time, between = find_leaks(subject, reference_BTV)
    if between is None and not subject.model.training:
        flipped_BTV = subject.logits(subject.tokens_BT.flip(0)).flip(0)
        if subject.moved(reference_BTV, flipped_BTV, torch.ones_like(subject.tokens_BT, dtype=torch.bool)):
            between = "the outputs depend on the order of the sequences"
    found = {
        "causality": along_time,
        "causality by gradient": find_gradient_leak(subject),
        "batch independence": between,
    }
    if documents:
        documents_BT = three_documents(subject.tokens_BT)
        reference_BTV = subject.logits(subject.tokens_BT, documents_BT)
        found["document isolation"] = find_leaks(subject, reference_BTV, documents_BT)[0]
    return found


def three_documents(tokens_BT: Tensor) -> Tensor:
    """(B, T) document numbers: rows of three documents, the borders apart from any round number."""
    length = tokens_BT.shape[1]
    time_T = torch.arange(length, device=tokens_BT.device)
    return ((time_T >= length // 3).long() + (time_T >= length - 5)).expand(tokens_BT.shape)


def unnormalised(subject: Subject) -> str | None:
    """Where the head's loss is not the cross-entropy of its own logits over the vocabulary, if anywhere."""
    head, vocab_size = subject.model.head, subject.model.spec.vocab_size
    with subject.repeatable(), torch.no_grad():
        h_BTD = subject.model(subject.tokens_BT)
        logits_BTV = head(h_BTD).float()
        if logits_BTV.shape[-1] != vocab_size:
            return f"the head gives {logits_BTV.shape[-1]} logits for a vocabulary of {vocab_size}"
        last = subject.tokens_BT.shape[1] - 1
        for row, position in ((0, 0), (0, last), (1, last // 2)):
            targets_BT = torch.full_like(subject.tokens_BT, -1)
            targets_BT[row, position] = target = subject.tokens_BT[row, position - 1]
            loss = float(head.loss(h_BTD, targets_BT))
            expected = float(F.cross_entropy(logits_BTV[row, position], target))
            if not abs(loss - expected) <= max(1e-4, subject.rounding) * max(1.0, expected):
                return (
                    f"the loss of the target at {position} alone is {loss:.4f}; by the softmax of the "
                    f"logits there it is {expected:.4f} nats"
                )
    return None


def length_dependence(subject: Subject) -> str | None:
    """How the first outputs change with the length of the row, if they do."""
    short_BT = subject.tokens_BT[:, : max(subject.tokens_BT.shape[1] - 7, 1)]
    long_BTV = subject.logits(subject.tokens_BT)[:, : short_BT.shape[1]]
    stray = subject.moved(subject.logits(short_BT), long_BTV, torch.ones_like(short_BT, dtype=torch.bool))
    if not stray:
        return None
    lengths = f"{short_BT.shape[1]} to {subject.tokens_BT.shape[1]}"
    return f"the output at {stray[0][1]} changes when the row grows from {lengths} tokens"


def trace_of_evaluation(subject: Subject) -> str | None:
    """What evaluating changes in the model, if anything."""
    before_BTV = subject.logits(subject.tokens_BT)
    named = zip(subject.model.named_buffers(), subject.buffers, strict=True)
    changed = [name for (name, buffer), kept in named if not torch.equal(buffer, kept)]
    if changed:
        return f"evaluating changes the buffer {changed[0]}"
    subject.logits(subject.tokens_BT.flip(1))
    if not torch.equal(before_BTV, subject.logits(subject.tokens_BT)):
        return "the same tokens give other logits after other tokens were evaluated"
    return None
