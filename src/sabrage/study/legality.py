"""What makes a result count beside a legal model: how validation is scored and which data is trained on.

Every validation target is scored exactly once, with the tokens before it; a training target is the token
after its input; and the validation text is not in the training stream.
"""

from collections.abc import Callable
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from sabrage.config import resolve
from sabrage.context import Context
from sabrage.model.legality import Check, Legality, examine, quick, scramble
from sabrage.model.lm import LM, build_model
from sabrage.parts import Batch, Corpus, TokenStream
from sabrage.recipe import Recipe
from sabrage.run.device import probe
from sabrage.train.evaluate import Evaluator
from sabrage.train.examined import blend_checks, longest_row
from sabrage.train.loop import make_loader
from sabrage.train.world import World

WINDOW_TOKENS, NUM_WINDOWS = 64, 32
MOST_SEEN = 1 / 8
SCAN_TOKENS = 1 << 22
LONGEST_FULL = 4096


def check_model(recipe: Recipe, *, documents: bool = False) -> Legality:
    """The quick form: a shrunken copy of the recipe's model, fp32, on the CPU."""
    window = recipe.plan.at(0).window
    return quick(recipe.model, max_length=longest_row(recipe), documents=documents, window=window)


def check_full(
    recipe: Recipe, device: torch.device, *, model: LM | None = None, documents: bool = False
) -> Legality:
    """The full form: the model at its size, row length and precision on `device`.

    `model` is a trained one with its weights as they are; without it a fresh one has noise on its weights.
    """
    if model is None:
        spec = resolve(recipe, probe(device)).model
        model = scramble(build_model(spec, seed=recipe.budget.seed)).to(device)
    recipe.precision.prepare_alone(model, device)
    length = min(longest_row(recipe), LONGEST_FULL)
    window = recipe.plan.at(0).window
    return examine(model, length=length, precision=recipe.precision, documents=documents, window=window)


def check_data(recipe: Recipe, corpus: Corpus) -> Legality:
    """How the recipe's validation is scored and what it trains on."""
    return Legality(
        (
            check_scoring(recipe, corpus.validation, end_of_text=corpus.end_of_text),
            check_targets(first_batch(recipe, corpus)),
            *blend_checks(recipe),
            check_unseen(corpus.train, corpus.validation[: recipe.budget.evaluation_tokens]),
        )
    )


def first_batch(recipe: Recipe, corpus: Corpus) -> Batch:
    """The first step's batch as training gets it."""
    with make_loader(recipe, corpus, World(torch.device("cpu")), step=0, block=0) as loader:
        return Batch(*next(loader))


class Witness:
    """Stands in for a model under validation: notes what it is given; a target's score is its own number."""

    def __init__(self) -> None:
        self.training = True
        self.modes: set[bool] = set()
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.borders_are_past = True
        self.end_of_text = -1
        self.head = self

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        return self

    def eval(self) -> Self:
        return self.train(False)

    def __call__(self, tokens_BT: Tensor, context: Context) -> Tensor:
        if context.documents_BT is not None:
            borders_BT = context.documents_BT.diff(dim=1) != 0
            ends_BT = (tokens_BT == self.end_of_text)[:, 1:]
            self.borders_are_past &= torch.equal(borders_BT, ends_BT)
        return tokens_BT

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        scored = targets_BT >= 0
        self.modes.add(self.training)
        self.inputs.append(tokens_BT[scored])
        self.targets.append(targets_BT[scored])
        return targets_BT[scored].double().mean().nan_to_num()


def check_scoring(
    recipe: Recipe,
    validation: np.ndarray,
    *,
    evaluator: Callable[..., Evaluator] = Evaluator,
    end_of_text: int | None = None,
) -> Check:
    """Whether the evaluator scores every validation target once, in order, in eval mode, at equal weight.

    Documents, where they are kept apart, must begin at the inputs that are `end_of_text`, so that a target
    does not show in the mask of its own input. `validation` is (N,) uint16. Raises ValueError when it has
    fewer tokens than the recipe scores.
    """
    witness, count = Witness(), recipe.budget.evaluation_tokens
    witness.end_of_text = -1 if end_of_text is None else end_of_text
    evaluate = evaluator(
        cast(Any, witness),
        recipe.precision,
        World(torch.device("cpu")),
        validation,
        num_targets=count,
        length=recipe.budget.evaluation_length,
        batch_tokens=8192,
        compile=False,
        end_of_text=end_of_text if recipe.budget.evaluation_documents else None,
    )
    loss = evaluate()
    inputs, targets = (torch.cat(seen).numpy() for seen in (witness.inputs, witness.targets))
    fault = None
    if len(targets) != count:
        fault = f"{len(targets):,} targets are scored where the budget has {count:,}"
    elif not np.array_equal(targets, validation[1 : count + 1]):
        fault = f"the target at {first_difference(targets, validation[1:])} is not the next validation token"
    elif not np.array_equal(inputs, validation[:count]):
        fault = f"the input at {first_difference(inputs, validation)} is not the token before its target"
    elif not witness.borders_are_past:
        fault = "documents are told apart by more than the ends of text among the inputs so far"
    elif witness.modes != {False}:
        fault = "the model is scored in train mode"
    elif not abs(loss - targets.mean()) <= 1e-5 * max(1.0, targets.mean()):
        fault = f"the targets do not weigh the same: their mean is {targets.mean():.6f}, scored as {loss:.6f}"
    return Check("validation scoring", fault is None, fault or f"{count:,} targets, each once and in order")


def first_difference(left: np.ndarray, right: np.ndarray) -> int:
    """The first index at which `left` differs from the beginning of `right`."""
    return int(np.argmax(left != right[: len(left)]))


def check_targets(batch: Batch) -> Check:
    """Whether every training target is the token after its input, by the inputs of the same document."""
    tokens_BT, targets_BT = batch.tokens_BT, batch.targets_BT
    wrong = (targets_BT[:, :-1] != tokens_BT[:, 1:]) & (targets_BT[:, :-1] >= 0)
    if batch.documents_BT is not None:
        wrong &= batch.documents_BT.diff(dim=1) == 0
    name = "training targets"
    if not wrong.any():
        return Check(name, True, f"each of {wrong.numel():,} is the token after its input")
    row, position = wrong.nonzero()[0].tolist()
    offsets = [offset for offset in range(-3, 4) if matches(tokens_BT, targets_BT, offset)]
    shift = f"; all are shifted, target t is input t{offsets[0]:+d}" if offsets else ""
    return Check(name, False, f"the target at {position} of row {row} is not the next input{shift}")


def matches(tokens_BT: Tensor, targets_BT: Tensor, offset: int) -> bool:
    """Whether every target t is the input at t + offset, where the row has one."""
    length = tokens_BT.shape[1]
    start, end = max(0, -offset), min(length, length - offset)
    return start < end and torch.equal(targets_BT[:, start:end], tokens_BT[:, start + offset : end + offset])


def check_unseen(train: TokenStream, validation: np.ndarray) -> Check:
    """Whether the scored validation text, (N,) uint16, is kept out of the whole training stream.

    Stretches of 64 tokens, evenly spread, are looked for. One may stand in both splits by its own right, a
    licence or a quotation: with web text without near duplicates 0.2 % do, 3 % at 8 tokens. Above an eighth
    the split is broken: documents that quote each other were told apart only as wholes, say.
    """
    width = min(WINDOW_TOKENS, len(validation))
    starts = np.unique(np.linspace(0, len(validation) - width, NUM_WINDOWS).astype(int))
    windows = [np.asarray(validation[start : start + width]) for start in starts]
    seen = np.zeros(len(windows), bool)
    step = max(SCAN_TOKENS // train.block_tokens, 1)
    for first in range(0, train.blocks_per_epoch, step):
        count = min(step, train.blocks_per_epoch - first)
        # A row's last token is the next row's first, so that without it the blocks join up.
        tokens = train.rows(first, count, train.block_tokens)[:, :-1].reshape(-1)
        for index in np.flatnonzero(~seen):
            seen[index] = contains(tokens, windows[index])
    detail = f"{seen.sum()} of {len(windows)} stretches of {width} tokens are in the training stream as well"
    return Check("validation kept out of training", bool(seen.mean() <= MOST_SEEN), detail)


def contains(tokens: np.ndarray, window: np.ndarray) -> bool:
    """Whether `window`, (W,), occurs in `tokens`, (N,)."""
    values, counts = np.unique(window, return_counts=True)
    # Few places are left to compare when the search begins with a token that the window has once.
    anchor = int(np.flatnonzero(window == values[counts.argmin()])[0])
    starts = np.flatnonzero(tokens == window[anchor]) - anchor
    starts = starts[(starts >= 0) & (starts + len(window) <= len(tokens))]
    for offset in range(len(window)):
        starts = starts[tokens[starts + offset] == window[offset]]
    return bool(len(starts))
