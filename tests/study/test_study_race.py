import json
import re

import pytest

from sabrage.cli import main
from sabrage.recipes import RECIPES
from sabrage.report.tables import table
from sabrage.study.launch import Local
from sabrage.study.plan import StudyError, parse_variant
from sabrage.study.race import Race, RacePlan, smallest

# The stand-in's loss is 3 + 40 / (steps (1 + layers / 40)) and noise of 0.004, so 400 / 1.1 steps give 3.1.
DEMO = parse_variant("demo")
PLAN = RacePlan(variant=DEMO, target=3.1, grid=20, most=800, seeds=3)


def race(program, folder, plan=PLAN):
    return Race(plan, folder, Local(program=program)).run()


@pytest.mark.parametrize("start", [1, 40, 400, 4000])
@pytest.mark.parametrize("needed", [1, 10, 11, 390, 395, 800])
def test_the_smallest_count_is_found_from_wherever_the_search_starts(start, needed):
    asked = []

    def meets(steps):
        asked.append(steps)
        return steps >= needed

    assert smallest(meets, start=start, grid=10, most=800) == -(-needed // 10) * 10
    assert len(asked) == len(set(asked)) <= 20


def test_a_target_out_of_reach_is_an_error_that_says_how_far_was_tried():
    with pytest.raises(StudyError, match="even 790 steps do not meet"):
        smallest(lambda steps: False, start=100, grid=10, most=799)


def test_a_race_confirms_with_fresh_seeds_what_one_seed_found(program, tmp_path):
    summary = race(program, tmp_path / "race")
    last = summary["rows"][-1]
    assert summary["confirmed"]
    assert last["p"] < 0.01
    assert last["loss"] < 3.1
    assert 0 not in [seed for row in summary["rows"] for seed in row["seeds"]]
    assert last["train_seconds"] == pytest.approx(last["steps"] * 0.04)
    assert summary["sentences"] == [
        f"{last['steps']} steps meet the target 3.1 with p = {last['p']:.2g} (n=3)"
    ]


def test_every_confirmation_is_told_and_the_next_one_is_longer_with_seeds_of_its_own(program, tmp_path):
    plan = RacePlan(variant=DEMO, target=3.1, grid=2, most=800, seeds=3, attempts=2)
    summary = race(program, tmp_path / "race", plan)
    first, second = summary["rows"]
    assert (first["confirmed"], summary["confirmed"]) == (False, False)
    assert second["steps"] == first["steps"] + 2
    assert (first["seeds"], second["seeds"]) == ([1, 2, 3], [4, 5, 6])
    assert summary["sentences"][0].startswith("not confirmed: ")
    assert any("2 confirmations were tried" in note for note in summary["notes"])


def test_a_race_that_is_called_again_repeats_no_run(program, calls, tmp_path):
    first = race(program, tmp_path / "race")
    started = len(calls())
    assert race(program, tmp_path / "race") == first
    assert len(calls()) == started == len(set(calls()))


def test_the_cost_is_counted_in_steps_of_the_base(program, calls, tmp_path):
    plan = RacePlan(variant=DEMO, base=parse_variant("demo+model.layers=8"), target=3.1, grid=20, most=800)
    summary = race(program, tmp_path / "race", plan)
    last = summary["rows"][-1]
    assert last["base_step_seconds"] == 0.08
    assert last["base_steps"] == pytest.approx(last["train_seconds"] / 0.08)
    bases = [name for name in calls() if "model.layers=8@40" in name]
    assert len(bases) == 5 * len(summary["rows"])
    assert "cost in base steps" in table(summary)


def test_without_a_target_the_base_is_what_must_be_beaten(program, tmp_path):
    plan = RacePlan(variant=parse_variant("demo+model.layers=8"), base=DEMO, grid=10, most=800, seeds=3)
    summary = race(program, tmp_path / "race", plan)
    equal = RECIPES["demo"].plan.steps * (1 + 4 / 40) / (1 + 8 / 40)
    assert equal - 20 <= summary["rows"][-1]["steps"] <= equal + 45
    assert summary["rows"][-1]["margin"] < 0


def test_a_failed_run_ends_the_race_and_names_what_it_printed(program, tmp_path):
    plan = RacePlan(variant=parse_variant("demo+model.layers=3"), target=3.1, grid=20, most=800)
    with pytest.raises(StudyError, match=r"seed-0\.txt"):
        race(program, tmp_path / "race", plan)


def test_a_race_without_a_goal_is_refused(capsys):
    assert main(["study", "race", "demo"]) == 1
    assert re.search("needs --target LOSS, --base RECIPE, or both", capsys.readouterr().err)


def test_a_race_on_the_command_line_writes_its_summary(program, tmp_path, monkeypatch):
    monkeypatch.setattr("sabrage.cli.study.Race.launcher", lambda self: Local(program=program))
    words = ["study", "race", "demo", "--target", "3.1", "--grid", "40", "--seeds", "2", "--out", "race"]
    ending = main([*words, "--result", "race.json"])
    result = json.loads((tmp_path / "race.json").read_text())
    assert ending == (0 if result["confirmed"] else 1)
    assert result["name"] == "race"
    assert (tmp_path / "race" / "summary.md").read_text().startswith("| steps | n | mean loss |")
