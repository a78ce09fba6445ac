import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sabrage.data.tokenizer import ByteTokenizer
from sabrage.generate.score import Answer, Question, answer, log_probabilities, read_hellaswag
from sabrage.model.lm import build_model
from sabrage.parts import DataError
from sabrage.precision.autocast import Fp32

BYTES = ByteTokenizer()


class Liking(nn.Module):
    """A model that ignores the context: the logit of each liked byte is given, of all others 0."""

    def __init__(self, liked):
        super().__init__()
        logits_V = torch.zeros(257)
        for letter, logit in liked.items():
            logits_V[ord(letter)] = logit
        self.logits_V = nn.Parameter(logits_V)
        self.head = lambda h_BTD: h_BTD
        self.spec = SimpleNamespace()

    def forward(self, tokens_BT):
        return self.logits_V.expand(*tokens_BT.shape, -1)


def only(model, question, length=100):
    return next(answer(model, [question], BYTES, Fp32(), length=length))


def test_the_liked_ending_is_chosen():
    question = Question("A:", ("xxxx", "yyyy", "zzzz", "wwww"), 2)
    assert only(Liking({"z": 5.0}), question) == Answer(True, True)
    assert only(Liking({"x": 5.0}), question) == Answer(False, False)


def test_the_length_of_an_ending_is_taken_out_of_its_score():
    # log p(x) is about -3.1 and log p(y) about -4.1: eight x cost more than one y, but less a byte.
    question = Question("A:", ("y", "xxxxxxxx", "qqqqqqqq", "rrrrrrrr"), 1)
    assert only(Liking({"x": 3.5, "y": 2.5, " ": 6.0}), question) == Answer(True, False)


def test_bytes_count_and_not_characters():
    # Both endings have eight characters; the second has sixteen bytes, each a little less likely.
    liked = {"x": 2.0} | {chr(byte): 1.5 for byte in "é".encode()}
    assert only(Liking(liked), Question("A:", ("x" * 8, "é" * 8), 0)) == Answer(True, True)
    dear = {"x": 2.0} | {chr(byte): 2.1 for byte in "é".encode()}
    assert only(Liking(dear | {" ": 6.0}), Question("A:", ("x" * 8, "é" * 8), 1)) == Answer(True, False)


@pytest.fixture
def model(tiny):
    model = build_model(tiny.model, seed=1).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


@torch.no_grad()
def naive(model, context, ending):
    """The sum over the ending's tokens, one forward pass for each."""
    total, tokens = 0.0, list(context)
    for token in ending:
        total += model.logits(torch.tensor([tokens]))[0, -1].log_softmax(-1)[token].item()
        tokens.append(token)
    return total


def test_scores_are_those_of_one_token_after_another_whatever_the_padding(model):
    context, endings = [256, *b"The cat"], [list(b" sat"), list(b" is a long one"), list(b"!")]
    found = log_probabilities(model, context, endings, Fp32(), length=64)
    assert found == pytest.approx([naive(model, context, ending) for ending in endings], abs=1e-4)


def test_of_a_long_row_the_beginning_is_left_out(model):
    context, ending = [256, *b"The cat sat on the mat"], list(b" and purred")
    [found] = log_probabilities(model, context, [ending], Fp32(), length=16)
    row = [*context, *ending][-17:]
    assert found == pytest.approx(naive(model, row[: -len(ending)], ending), abs=1e-4)


def test_questions_are_read_from_the_public_format(tmp_path):
    row = {"ind": 24, "activity_label": "x", "ctx_a": "A", "ctx_b": "b", "ctx": "A\u2028b", "split": "val",
           "endings": ["c", "d", "e", "f"], "label": 3, "source_id": "y"}  # fmt: skip
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(
        "\n".join(json.dumps(row | {"label": label}, ensure_ascii=False) for label in (3, "1")) + "\n"
    )
    assert read_hellaswag(path) == [Question("A\u2028b", ("c", "d", "e", "f"), label) for label in (3, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ("{}", r":1: not a question \(KeyError"),
        ("nonsense", r":1: not a question \(JSONDecodeError"),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', ":1: label 1 of 1 endings"),
        ('{"ctx": "a", "endings": ["b", ""], "label": 1}', ":1: an ending is empty"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_hellaswag(path)
