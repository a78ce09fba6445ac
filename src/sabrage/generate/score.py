"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings does the model find likeliest?

An ending's score is the sum of the log-probabilities of its tokens after <|endoftext|>, the context and a
space. The length-normalised accuracy, `acc_norm`, takes the ending with the highest score / bytes of the
ending, `acc` that of the highest score alone; chance is a quarter. Texts are taken as the file has them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from sabrage.model.lm import LM
from sabrage.parts import DataError, Precision, Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its endings and the number of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Answer:
    """Whether the right ending was chosen, with and without normalising by length."""

    normalised: bool
    plain: bool


def read_hellaswag(path: Path) -> list[Question]:
    """The questions of the public format, a JSON object a line: ctx, endings, label. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give HellaSwag's hellaswag_val.jsonl")
    found = []
    # Not splitlines: a text may hold a separator of its own.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(row["ctx"], tuple(row["endings"]), int(row["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a question ({type(error).__name__}: {error}); each line needs ctx, "
                "endings and label, as in hellaswag_val.jsonl"
            ) from error
        if not 0 <= question.label < len(question.endings):
            raise DataError(f"{path}:{number}: label {question.label} of {len(question.endings)} endings")
        if not all(question.endings):
            raise DataError(f"{path}:{number}: an ending is empty; give a text for each")
        found.append(question)
    if not found:
        raise DataError(f"{path}: holds no question; give HellaSwag's hellaswag_val.jsonl")
    return found


def answer(
    model: LM, questions: Sequence[Question], tokenizer: Tokenizer, precision: Precision, *, length: int
) -> Iterator[Answer]:
    """Answers the questions one after another. Of a row beyond `length` tokens the beginning is left out."""
    for question in questions:
        context = [tokenizer.end_of_text, *tokenizer.encode(question.context)]
        endings = [f" {ending}" for ending in question.endings]
        scores = log_probabilities(
            model, context, [tokenizer.encode(ending) for ending in endings], precision, length=length
        )
        shares = [
            score / len(ending.encode()) for score, ending in zip(scores, question.endings, strict=True)
        ]
        right = question.label
        yield Answer(shares.index(max(shares)) == right, scores.index(max(scores)) == right)


@torch.no_grad()
def log_probabilities(
    model: LM, context: Sequence[int], endings: Sequence[Sequence[int]], precision: Precision, *, length: int
) -> list[float]:
    """The log-probability, in nats, of each ending's tokens after the context, the softmax in fp32."""
    # Inputs and targets of a row are its tokens without the last and without the first.
    rows = [[*context, *ending][-(length + 1) :] for ending in endings]
    width = max(map(len, rows)) - 1
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    targets_BT = torch.full((len(rows), width), -1)
    for index, (row, ending) in enumerate(zip(rows, endings, strict=True)):
        first = max(len(row) - 1 - len(ending), 0)
        tokens_BT[index, : len(row) - 1] = torch.tensor(row[:-1])
        targets_BT[index, first : len(row) - 1] = torch.tensor(row[first + 1 :])
    device = next(model.parameters()).device
    tokens_BT, targets_BT = tokens_BT.to(device), targets_BT.to(device)
    with precision.autocast(device):
        h_BTD = model(tokens_BT)
        # Only the endings meet the vocabulary.
        logits_NV = model.head(h_BTD[targets_BT >= 0])
    losses_N = F.cross_entropy(logits_NV.float(), targets_BT[targets_BT >= 0], reduction="none")
    losses_BT = torch.zeros(targets_BT.shape, device=device)
    losses_BT[targets_BT >= 0] = losses_N
    return (-losses_BT.double().sum(1)).tolist()
