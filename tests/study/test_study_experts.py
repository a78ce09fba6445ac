"""Which expert takes which kind: rigged and indifferent routers on two kinds of text, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sabrage.cli import main
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.feedforward.moe import MixtureOfExperts
from sabrage.feedforward.routing import Gate
from sabrage.model.lm import build_model
from sabrage.parts import DataError
from sabrage.precision.autocast import Fp32
from sabrage.study.experts import Document, count_choices, examine, information, read_kinds

DIGITS, LETTERS = "0123456789", "abcdefghij"


@pytest.fixture
def kinds(tmp_path):
    """A folder of two kinds, in both forms: 30 documents of random digits and 20 of random letters."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "kinds"
    (folder / "words").mkdir(parents=True)
    numbers = ["".join(generator.choice(list(DIGITS), 60)) for _ in range(30)]
    (folder / "numbers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in numbers))
    for index in range(20):
        text = "".join(generator.choice(list(LETTERS), 60))
        (folder / "words" / f"{index:02}.txt").write_text(text)
    return folder


def rigged(spec, first):
    """A model whose second layer sends the characters of `first` to expert 0 and all others to expert 1."""
    model = build_model(spec, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out.weight.zero_()
            block.feedforward.down_weight.zero_()
        model.embedding.weight[:, 0] = -1.0
        model.embedding.weight[[ord(character) for character in first], 0] = 1.0
        router = model.blocks[1].feedforward.router
        router.weight.zero_()
        router.weight[0, 0], router.weight[1, 0] = 9.0, -9.0
    return model


def with_experts(recipe, **changes):
    part = MixtureOfExperts(experts=2, gate=Gate(balance_loss=0.01), **changes)
    return replace(recipe, model=replace(recipe.model, feedforwards=(part,)))


def found_by(model, documents):
    counts = list(count_choices(model, documents, ByteTokenizer(), Fp32(), length=64))
    return examine(documents, counts, shuffles=500)


def test_a_router_that_tells_the_kinds_apart_is_found_out(tiny, kinds):
    documents = read_kinds(kinds)
    found = found_by(rigged(with_experts(tiny).model, DIGITS), documents)
    assert [(kind["name"], kind["documents"]) for kind in found["kinds"]] == [("numbers", 30), ("words", 20)]
    layer = found["layers"][1]
    assert layer["shares"] == [[1.0, 0.0], [0.0, 1.0]]
    assert layer["load"] == [0.6, 0.4]
    assert layer["information"] == pytest.approx(found["most"])
    assert layer["p"] == pytest.approx(1 / 501)


def test_a_router_that_does_not_care_for_the_kinds_is_not_significant(tiny, kinds):
    # Half of the digits and half of the letters go to each.
    model = rigged(with_experts(tiny).model, "02468acegi")
    model.blocks[0].feedforward.router.load_state_dict(model.blocks[1].feedforward.router.state_dict())
    found = found_by(model, read_kinds(kinds))
    assert all(layer["p"] > 0.05 for layer in found["layers"])
    assert all(0.4 < share < 0.6 for layer in found["layers"] for share in layer["load"])


def test_long_documents_do_not_count_as_many():
    # Two documents a kind: whatever their tokens say, shuffling finds the same split often.
    counts = [{0: np.array(row)} for row in ((5000, 0), (4000, 0), (0, 3000), (0, 9000))]
    documents = [Document(kind, "text") for kind in "aabb"]
    found = examine(documents, counts, shuffles=500)
    assert found["layers"][0]["information"] == pytest.approx(1.0)
    assert found["layers"][0]["p"] > 0.2


def test_information_is_that_of_the_table():
    shares_DE = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]])
    joint = np.array([[0.375, 0.125], [0.0, 0.5]])
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    wanted = sum(p * np.log2(p / q) for p, q in zip(joint.flat, independent.flat, strict=True) if p)
    assert information(shares_DE, np.array([[0, 0, 1, 1]]))[0] == pytest.approx(wanted)
    assert information(np.full((4, 3), 1 / 3), np.array([[0, 1, 0, 1]]))[0] == pytest.approx(0)


def test_what_is_no_folder_of_kinds_is_told_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_kinds(tmp_path / "missing")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    with pytest.raises(DataError, match="1 kinds with two documents or more"):
        read_kinds(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1: no object with a text"):
        read_kinds(tmp_path)


def test_a_model_without_experts_is_refused(tiny):
    with pytest.raises(DataError, match="no experts to look at"):
        next(count_choices(build_model(tiny.model, seed=0), [], ByteTokenizer(), Fp32(), length=8))


def test_the_command_writes_a_table_a_page_and_the_numbers(run_recipe, tiny, kinds, capsys):
    _, run = run_recipe(with_experts(tiny, active=1))
    arguments = ["experts", str(run.path), "--kinds", str(kinds), "--limit", "5", "--device", "cpu"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "by chance" in shown
    assert f"experts: {run.path / 'experts.html'}" in shown.replace("\n", "")
    found = json.loads((run.path / "experts.json").read_text())
    assert [kind["documents"] for kind in found["kinds"]] == [5, 5]
    page = (run.path / "experts.html").read_text()
    assert page.count("<svg") >= 2
    assert "Entropy of the load" in page
