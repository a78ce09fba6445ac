import pytest
import torch

from sabrage.cli import main

USER_ERRORS = {
    "a misspelt recipe": (["train", "dmo"], "unknown recipe 'dmo' (did you mean 'demo'?)"),
    "a misspelt field": (
        ["train", "demo", "--set", "model.layer=3"],
        "model has no field 'layer' (did you mean 'layers'?)",
    ),
    "a misspelt part": (["show", "demo", "--set", "plan.lr=Trapezoyd"], "did you mean 'Trapezoid'?"),
    "a misspelt choice": (
        ["show", "demo", "--set", "model.mixers.0.backend=sdpaa"],
        "got 'sdpaa' (did you mean 'sdpa'?), allowed: 'auto', 'plain', 'sdpa'",
    ),
    "a wrong type": (
        ["train", "demo", "--set", "model.layers=three"],
        "model.layers: got 'three', allowed: a whole number",
    ),
    "a part of another kind": (
        ["show", "demo", "--set", "plan.lr=Fp32"],
        "plan.lr: got Fp32, allowed: a part: ",
    ),
    "an assignment without a value": (["show", "demo", "--set", "model.layers"], "such as plan.steps=100"),
    "no steps": (["train", "demo", "--steps", "0"], "plan.steps=0 must be at least 1"),
    "several problems at once": (
        ["train", "demo", "--steps", "0", "--set", "model.dim=0", "--set", "budget.log_every=0"],
        "budget.log_every=0 must be at least 1",
    ),
    "heads that do not fit": (
        ["show", "demo", "--set", "model.dim=192", "--set", "model.mixers.0.heads=7"],
        "heads=7",
    ),
    "an unknown device": (["train", "demo", "--device", "gpu"], "unknown device 'gpu'; allowed: auto, cpu"),
    "no such run to score": (["eval", "nowhere"], "nowhere holds no run"),
    "no such run to write with": (["generate", "nowhere"], "nowhere holds no run"),
    "nothing to resume": (["train", "demo", "--resume"], "no run of 'demo' in runs/ to resume; name its"),
    "a folder that is no run": (["train", "demo", "--resume", "--out", "."], "holds no run to resume"),
    "changes when resuming": (
        ["train", "demo", "--resume", "--set", "plan.steps=3"],
        "--resume goes on with the run's own recipe; leave out --set, --seed, --steps",
    ),
    "a seed when resuming": (["train", "demo", "--resume", "--seed", "3"], "leave out --set, --seed"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), USER_ERRORS.values(), ids=USER_ERRORS)
def test_a_mistake_is_told_in_a_sentence_and_exits_with_1(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("sabrage: ")
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_recipe_are_told_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments, _ = USER_ERRORS["several problems at once"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert [name for name in ("plan.steps=0", "model.dim=0", "budget.log_every=0") if name not in error] == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tarin"],
        ["train"],
        ["train", "demo", "--sede", "1"],
        ["train", "demo", "--seed", "one"],
        ["eval"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_points_to_the_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    written = capsys.readouterr()
    assert "--help" in written.err + written.out


def test_a_misspelt_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["train", "demo", "--sede", "1"])
    written = capsys.readouterr()
    assert "--seed" in written.err + written.out


def test_a_card_that_is_not_there_is_named_with_those_that_are(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "demo", "--device", "cuda:5"]) == 1
    assert "device 'cuda:5' is not there; this machine has cuda:0 to cuda:1" in capsys.readouterr().err


def test_ctrl_c_outside_the_loop_exits_with_130(monkeypatch):
    from sabrage.cli.describe import List

    def run(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(List, "run", run)
    assert main(["list"]) == 130
