import json
import math
import re

import pytest
import torch

from sabrage.cli import main
from sabrage.cli.choose import model_of_run


@pytest.fixture
def score(tiny_options, tmp_path, monkeypatch, one_thread, capsys):
    """score(*options) -> what `sabrage eval run` prints of a trained run."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", *tiny_options, "--out", "run"]) == 0

    def text(*options):
        capsys.readouterr()
        assert main(["eval", "run", "--device", "cpu", *options]) == 0
        return capsys.readouterr().out

    return text


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def test_a_text_has_a_loss_a_perplexity_and_bits_per_byte(score, tmp_path):
    text = "Naïve text, 日本 too.\n" * 5
    (tmp_path / "text.txt").write_text(text)
    loss, perplexity, count, bits = numbers(score("--text", "text.txt", "--length", "16"))
    _, model = model_of_run(tmp_path / "run", device=torch.device("cpu"))
    tokens = [256, *text.encode()]
    with torch.no_grad():
        rows = [tokens[start : start + 17] for start in range(0, len(tokens) - 1, 16)]
        losses = [model.head.loss(model(torch.tensor([row[:-1]])), torch.tensor([row[1:]])) for row in rows]
    expected = sum(loss.item() * (len(row) - 1) for loss, row in zip(losses, rows, strict=True)) / count
    assert count == len(text.encode())
    assert loss == pytest.approx(expected, abs=2e-5)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    # One token a byte.
    assert bits == pytest.approx(loss / math.log(2), abs=1e-3)


def test_the_first_tokens_of_a_text_can_be_asked_for(score, tmp_path):
    (tmp_path / "long.txt").write_text("abcdefgh" * 20)
    (tmp_path / "short.txt").write_text("abcdefgh" * 4)
    assert score("--text", "long.txt", "--tokens", "32") == score("--text", "short.txt")


def test_hellaswag_is_scored_with_its_standard_error(score, tmp_path):
    rows = [{"ctx": "48 and", "endings": ["a", "bb", "ccc", "dddd"], "label": label} for label in range(4)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = score("--task", "hellaswag", "--file", "h.jsonl")
    # The same question with each label once: one of four is right, whatever the model likes.
    assert "acc_norm 0.2500 +- 0.2165, acc 0.2500, 4 questions" in printed
    assert ", 3 questions" in score("--task", "hellaswag", "--file", "h.jsonl", "--limit", "3")


MISTAKES = {
    "a task without its file": (["--task", "hellaswag"], "--task and --file go together"),
    "a file without a task": (["--file", "x.jsonl"], "--task and --file go together"),
    "two at once": (["--text", "a", "--data", "b"], "score one at a time"),
    "tokens of a task": (["--task", "hellaswag", "--file", "x", "--tokens", "3"], "takes --limit questions"),
    "a limit of a text": (["--text", "a", "--limit", "3"], "questions of a --task"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_options_that_do_not_go_together_are_refused(options, message, capsys):
    assert main(["eval", "nowhere", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [(b"", "holds no text"), (b"\xff\xfe", "not UTF-8 text")])
def test_what_is_no_text_is_refused(score, tmp_path, capsys, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    assert main(["eval", "run", "--device", "cpu", "--text", "bad.txt"]) == 1
    assert message in capsys.readouterr().err


def test_the_loss_is_told_by_position_when_asked(score):
    printed = score("--length", "100", "--tokens", "500", "--by-position")
    losses = [float(loss) for loss in re.findall(r"positions .*: ([\d.]+) nats", printed)]
    whole = float(re.search(r"validation loss ([\d.]+)", printed)[1])
    assert "positions 64 to 99" in printed
    assert (losses[0] * 64 + losses[1] * 36) / 100 == pytest.approx(whole, abs=2e-5)


def test_positions_can_be_stretched_beyond_the_trained_length(score):
    stretch = ("--set", "model.mixers.0.rotary.factor=4", "--set", "model.mixers.0.rotary.original_length=32")
    plain, stretched = (score("--length", "128", *options) for options in ((), stretch))
    assert numbers(plain)[0] != numbers(stretched)[0]
    assert abs(numbers(plain)[0] - numbers(stretched)[0]) < 0.5


def test_a_change_that_needs_other_weights_is_refused(score, capsys):
    score()
    assert main(["eval", "run", "--device", "cpu", "--set", "model.dim=64"]) == 1
    assert "sabrage: " in capsys.readouterr().err


@pytest.fixture
def blended(tiny_options, tmp_path, monkeypatch, one_thread, capsys):
    """What result.json says of a run with a blend."""
    monkeypatch.chdir(tmp_path)
    blend = '{"part": "Blend", "held_out": 1500, "steps": 60, "batch": 256}'
    assert main(["train", "demo", *tiny_options, "--set", f"blend={blend}", "--out", "run"]) == 0
    capsys.readouterr()
    return json.loads((tmp_path / "run" / "result.json").read_text())


def test_a_run_with_a_blend_is_scored_with_it_and_without(blended, tmp_path, capsys):
    assert main(["eval", "run", "--device", "cpu"]) == 0
    alone, mixed = said(capsys.readouterr().out)
    assert alone == pytest.approx(blended["network_loss"], abs=2e-5)
    assert mixed == pytest.approx(blended["validation_loss"], abs=2e-5)
    (tmp_path / "run" / "blend.safetensors").unlink()
    assert main(["eval", "run", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "the network alone" in told
    assert f"{alone:.5f}" in told


def said(text):
    """(loss of the network alone, loss of the mixture) that `eval` has told."""
    return tuple(float(found) for found in re.findall(r"(\d\.\d{5}) nats", text))


def test_a_blend_is_fitted_anew_to_what_the_run_has_learned(blended, tmp_path, capsys):
    kept = (tmp_path / "run" / "blend.safetensors").read_bytes()
    again = ["eval", "run", "--device", "cpu", "--refit"]
    assert main(again) == 0
    told = capsys.readouterr().out
    assert said(told) == pytest.approx((blended["network_loss"], blended["validation_loss"]), abs=2e-5)
    assert re.search(r"^counting [\d.]+ s, looking [\d.]+ s, fitting [\d.]+ s$", told, re.MULTILINE)
    assert main([*again, "--set", "blend.text_orders=1", "--set", "blend.candidates=Candidates"]) == 0
    alone, mixed = said(capsys.readouterr().out)
    assert alone == pytest.approx(blended["network_loss"], abs=2e-5)
    assert abs(mixed - blended["validation_loss"]) > 1e-3
    assert (tmp_path / "run" / "blend.safetensors").read_bytes() == kept


def test_what_cannot_be_fitted_anew_is_told(score, tmp_path, capsys, monkeypatch):
    score()
    assert main(["eval", "run", "--device", "cpu", "--refit"]) == 1
    assert "--set blend=Blend" in capsys.readouterr().err
    few = '{"part": "Blend", "held_out": 1500, "steps": 9, "batch": 64}'
    assert main(["eval", "run", "--device", "cpu", "--refit", "--set", f"blend={few}"]) == 0
    alone, mixed = said(capsys.readouterr().out)
    assert mixed < alone
    assert (
        main(["eval", "run", "--device", "cpu", "--refit", "--set", f"blend={few.replace('1500', '99999')}"])
        == 1
    )
    assert "fewer plan.steps" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("text")
    assert main(["eval", "run", "--refit", "--text", str(tmp_path / "a.txt")]) == 1
    assert "--refit is for a blend" in capsys.readouterr().err


def test_a_damaged_blend_names_the_remedy(blended, tmp_path, capsys):
    (tmp_path / "run" / "blend.safetensors").write_bytes(b"\x00" * 9)
    assert main(["eval", "run", "--device", "cpu"]) != 0
    assert "remove it to score the network" in capsys.readouterr().err
