import json

import pytest

from sabrage.cli import main
from sabrage.cli.describe import needs
from sabrage.config import from_json, override
from sabrage.recipes import RECIPES, changed
from sabrage.run.device import DeviceFacts


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables are not folded."""
    monkeypatch.setenv("COLUMNS", "300")


def test_list_names_every_recipe_with_its_summary(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert [name for name, recipe in RECIPES.items() if name not in text or recipe.summary not in text] == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_json_of_show_is_the_recipe(name, capsys):
    assert main(["show", name, "--json"]) == 0
    assert from_json(json.loads(capsys.readouterr().out)) == RECIPES[name]


def test_the_changes_are_in_what_show_prints(capsys):
    changes = ["model.layers=2", "precision=Bf16", "model.layers=6"]
    assert main(["show", "demo", "--json", *(part for change in changes for part in ("--set", change))]) == 0
    assert from_json(json.loads(capsys.readouterr().out)) == changed(
        "demo", ["model.layers=6", "precision=Bf16"]
    )


def test_every_line_of_show_can_be_given_to_set(capsys):
    assert main(["show", "nocap"]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    recipe = RECIPES["nocap"]
    leaves = [line.replace(" = ", "=", 1) for line in lines if ".part = " not in line and line[:4] != "part"]
    assert "plan.steps=4768" in leaves
    for leaf in leaves:
        assert override(recipe, leaf) == recipe


def test_show_says_what_the_recipe_costs(capsys):
    assert main(["show", "nocap"]) == 0
    costs = capsys.readouterr().out.partition("\n\n")[2]
    for name in ("parameters", "FLOPs per token", "tokens needed", "memory by rows"):
        assert name in costs
    assert "123,532,032" in costs
    assert "2,499,805,184 (25.00 shards of 100M)" in costs


def test_show_tells_what_one_token_uses_apart_from_all_that_is_learned(capsys):
    assert main(["show", "moe-8"]) == 0
    costs = capsys.readouterr().out.partition("\n\n")[2]
    assert "parameters        519,967,584" in costs
    assert "active parameters 123,605,856" in costs
    assert main(["show", "base"]) == 0
    assert "active parameters 123,532,032" in capsys.readouterr().out


def test_doctor_has_a_verdict_for_every_recipe(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.partition("verdict")[2].splitlines()
    for name in RECIPES:
        (row,) = [line for line in lines if f"│ {name} " in line]
        assert any(f"│ {answer} " in row for answer in ("runs", "runs slower", "cannot")), row
    (nocap,) = [line for line in lines if "│ nocap " in line]
    assert "sabrage data fineweb" in nocap or "free" in nocap


def test_doctor_counts_what_any_part_refuses_not_the_precision_alone():
    cpu = DeviceFacts(kind="cpu", name="a processor", memory=0)
    recipe = override(RECIPES["demo"], "model.mixers.0.backend=flash")
    assert "attention backend 'flash' needs a CUDA device" in needs(recipe, cpu).refusal
    both = needs(override(recipe, "precision=Tf32"), cpu).refusal
    assert "attention backend" in both
    assert "TF32 needs a GPU" in both
    assert needs(RECIPES["demo"], cpu).refusal is None
