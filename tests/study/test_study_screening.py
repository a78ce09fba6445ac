"""Many changes at once: the design, the effects it finds, and a whole screening."""

import itertools
import json

import numpy as np
import pytest

from sabrage.cli import main
from sabrage.cli.study import Screen
from sabrage.config import ConfigError
from sabrage.recipes import find
from sabrage.report.tables import read_results, table
from sabrage.study.launch import Local
from sabrage.study.plan import StudyError, StudyPlan, same
from sabrage.study.runner import run_study
from sabrage.study.screening import (
    LETTERS,
    PLAIN,
    design,
    effects,
    lenth,
    lettered,
    screening,
    summarise_screening,
)

LAYERS, STEPS, EVERY = "model.layers=8", "plan.steps=540", "budget.log_every=5"


@pytest.mark.parametrize("num_factors", range(2, len(LETTERS) + 1))
def test_every_change_is_on_in_half_of_the_runs_and_no_two_go_together(num_factors):
    on_NF = design(num_factors)
    signs_NF = np.where(on_NF, 1, -1)
    count = len(on_NF)
    assert count % 4 == 0
    assert num_factors < count <= num_factors + 8
    assert np.array_equal(signs_NF.T @ signs_NF, count * np.eye(num_factors))
    assert not signs_NF.sum(0).any()
    assert not on_NF[0].any()


def test_more_than_the_largest_design_is_refused():
    with pytest.raises(StudyError, match="allowed: 2 to 26"):
        design(32)


def test_effects_are_found_whatever_the_others_do():
    true_F = np.array([-0.03, 0.0, 0.02, 0.0, 0.0, 0.01])
    on_NF = design(6)
    values = 3.5 + on_NF @ true_F
    found = effects(on_NF, values.tolist(), [0] * 8)
    assert [one.mean for one in found] == pytest.approx(true_F.tolist(), abs=1e-12)
    # One column is left: a run that disagrees makes an error, the same for all.
    values[3] += 0.008
    found = effects(on_NF, values.tolist(), [0] * 8)
    assert [one.mean for one in found] == pytest.approx(true_F.tolist(), abs=0.0021)
    assert all(one.sd == pytest.approx(0.002) for one in found)
    assert found[0].half == pytest.approx(12.706 * 0.002, rel=1e-3)
    assert found[0].p == pytest.approx(2 * (0.5 - np.arctan(abs(found[0].mean) / 0.002) / np.pi))


def test_seeds_have_levels_of_their_own():
    on_NF = np.vstack([design(3), design(3)])
    seeds = [0] * 4 + [1] * 4
    values = 3.5 + on_NF @ np.array([0.1, 0.0, -0.2]) + 5.0 * np.array(seeds)
    found = effects(on_NF, values.tolist(), seeds)
    assert [one.mean for one in found] == pytest.approx([0.1, 0.0, -0.2])
    assert max(one.half for one in found) < 1e-9


def test_a_missing_run_costs_precision_and_too_many_the_answer():
    on_NF = design(5)
    values = (3.5 + on_NF @ np.array([0.1, 0.0, -0.2, 0.0, 0.05])).tolist()
    found = effects(on_NF[1:], values[1:], [0] * 7)
    assert [one.mean for one in found] == pytest.approx([0.1, 0.0, -0.2, 0.0, 0.05])
    assert effects(on_NF[:5], values[:5], [0] * 5) is None
    assert effects(on_NF[:0], [], []) is None


def test_without_a_run_to_spare_noise_is_what_most_effects_are():
    """Seven changes in eight runs, of which one does something."""
    generator = np.random.default_rng(0)
    on_NF = design(7)
    values = 3.5 - 0.05 * on_NF[:, 2] + generator.normal(0, 0.003, 8)
    found = effects(on_NF, values.tolist(), [0] * 8)
    assert [abs(one.mean) > one.half for one in found] == [False, False, True, False, False, False, False]
    assert found[2].mean == pytest.approx(-0.05, abs=0.006)
    assert lenth(np.array([1.0, -1.0, 1.0, 50.0])) == pytest.approx(1.5)
    assert lenth(np.zeros(3)) == 0


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    on_NF, held = design(8), []
    for _ in range(400):
        values = 3.5 + 0.01 * on_NF[:, 0] + generator.normal(0, 0.003, 12)
        held += [
            abs(one.mean - truth) <= one.half
            for one, truth in zip(effects(on_NF, values.tolist(), [0] * 12), [0.01] + [0.0] * 7, strict=True)
        ]
    assert 0.93 <= np.mean(held) <= 0.97


def test_variants_are_the_recipe_and_half_of_the_changes_each():
    factors = lettered([LAYERS, STEPS + "+plan.lr.warmdown=100", EVERY])
    variants = screening("demo", factors, ["plan.lr.warmup=5"])
    names = [variant.name for variant in variants]
    assert names[0] == PLAIN
    assert sorted(names[1:]) == ["A B", "A C", "B C"]
    for variant in variants:
        recipe, letters = variant.make(), variant.name.split()
        assert recipe.plan.lr.warmup == 5
        assert recipe.model.layers == (8 if "A" in letters else 4)
        assert (recipe.plan.steps, recipe.plan.lr.warmdown) == ((540, 100) if "B" in letters else (270, 135))
        assert recipe.budget.log_every == (5 if "C" in letters else 10)
    assert same(screening("demo", lettered([LAYERS, EVERY]))[0].make(), find("demo"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([LAYERS], "got 1 changes"),
        ([LAYERS, "model.layers=2"], "changes A and B both touch model.layers"),
        (["plan.lr.warmdown=3", LAYERS, "plan.lr=Constant"], "changes C and A both touch plan.lr"),
        ([LAYERS, "words"], "got --change 'words'"),
        ([LAYERS, "demo+plan.steps=2"], "got --change"),
    ],
)
def test_changes_that_cannot_be_told_apart_are_refused(changes, said):
    with pytest.raises(StudyError, match=said):
        lettered(changes)


def test_a_change_that_no_recipe_takes_is_refused():
    with pytest.raises(ConfigError, match="layer"):
        screening("demo", lettered(["model.layerz=3", EVERY]))


def test_fields_with_a_common_beginning_are_different_fields():
    variants = screening("demo", lettered(["plan.lr.warmup=5", "plan.lr.warmdown=50"]))
    assert {variant.name for variant in variants} == {PLAIN, "A", "B", "A B"}


def screened(tmp_path, program, *changes, seeds=(0,)):
    factors = lettered(changes)
    plan = StudyPlan(kind="screen", variants=screening("demo", factors), seeds=seeds)
    jobs = run_study(plan, tmp_path / "study", Local(program=program))
    return summarise_screening("demo", factors, jobs, name="study")


def test_a_whole_screening_finds_what_helps_and_what_it_takes(program, calls, tmp_path):
    """More layers and more steps lower the stand-in's loss and take longer, logging does neither."""
    summary = screened(tmp_path, program, LAYERS, STEPS, EVERY, seeds=(0, 1))
    assert len(calls()) == 8
    rows = {row["factor"]: row for row in summary["rows"]}
    assert rows["A"]["change"] == LAYERS
    assert rows["A"]["effect"] < -rows["A"]["half"]
    assert rows["B"]["effect"] < -rows["B"]["half"]
    assert abs(rows["C"]["effect"]) < 0.01
    assert [rows[letter]["seconds"] for letter in "ABC"] == pytest.approx([100.0, 100.0, 0.0])
    last = summary["sentences"][-1]
    assert f"sabrage study compare demo demo+{LAYERS}+{STEPS}" in last
    assert "effects are taken to add up" in summary["notes"][-1]


def test_a_screening_of_which_too_little_is_done_says_so(program, tmp_path):
    """The stand-in fails with three layers: half of the runs."""
    summary = screened(tmp_path, program, "model.layers=3", STEPS)
    assert len(summary["failures"]) == 2
    assert all("effect" not in row for row in summary["rows"])
    assert any("too few runs" in note for note in summary["notes"])
    assert summary["sentences"] == []


def test_the_command_runs_it_and_writes_a_result(program, tmp_path, monkeypatch):
    monkeypatch.setattr(Screen, "launcher", lambda self: Local(program=program))
    words = ["study", "screen", "demo", "--change", LAYERS, "--change", STEPS, "--change", EVERY]
    words += ["--out", "study", "--result", "results/screen.json"]
    for _ in range(2):
        assert main(words) == 0
    result = read_results(tmp_path / "results")["screen"]
    assert [row["factor"] for row in result["rows"]] == ["A", "B", "C"]
    assert json.loads((tmp_path / "study" / "summary.json").read_text())["kind"] == "screen"
    assert "effect on the loss" in table(result)
    assert LAYERS in (tmp_path / "study" / "summary.md").read_text()


def test_combinations_are_the_ones_of_the_design():
    factors = lettered([LAYERS, STEPS, EVERY, "plan.lr.warmup=5", "budget.evaluate_every=0"])
    on = {frozenset(variant.name.split()) - {PLAIN} for variant in screening("demo", factors)}
    assert len(on) == 8
    for one, other in itertools.combinations("ABCDE", 2):
        assert sum({one, other} <= chosen for chosen in on) == 2
