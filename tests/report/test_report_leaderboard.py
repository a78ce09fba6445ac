import pytest

from sabrage.report.leaderboard import BASELINE_PARAMETERS, leaderboard, make_groups, remarks
from sabrage.run.folder import read_run

BASELINE = {"name": "nocap", "plan.tokens_per_step": 524_288}


@pytest.fixture
def baseline(make_run):
    """baseline(name, ...) -> a run of the NoCap baseline, by default on the official track."""

    def make(name, *, changes=None, track="nocap", **options):
        facts = {"parameters": BASELINE_PARAMETERS, "track": track} | options
        return make_run(name, changes=BASELINE | (changes or {}), **facts)

    return make


def board(*paths):
    """The rows of the only group: run folder -> texts by column title."""
    (group,) = make_groups([read_run(path) for path in paths])
    columns, rows = leaderboard(group)
    return {
        entry.run.path.name: {column.title: cells[column.key][1] for column in columns}
        for entry, cells in rows
    }


def test_the_three_clocks_stand_side_by_side(make_run):
    row = board(make_run("a", second=2.0))["a"]
    assert [row[clock] for clock in ("train", "nocap", "wall")] == ["1 min 20 s", "1 min 25 s", "1 min 29 s"]


def test_without_a_target_the_lowest_loss_comes_first_and_no_loss_last(make_run):
    runs = [make_run("none", steps=0), make_run("high", loss=4.0), make_run("low", loss=3.0)]
    assert list(board(*runs)) == ["low", "high", "none"]


def test_with_a_target_the_fastest_that_meet_it_come_first(make_run):
    goal = {"budget.target": 3.5}
    runs = [
        make_run("lowest", loss=3.1, second=9.0, changes=goal),
        make_run("misses", loss=3.6, second=1.0, changes=goal),
        make_run("fastest", loss=3.5, second=2.0, changes=goal),
    ]
    assert list(board(*runs)) == ["fastest", "lowest", "misses"]


def test_a_run_that_goes_on_has_not_met_its_target(make_run):
    goal = {"budget.target": 3.9}
    runs = [make_run("on", done=False, second=1.0, changes=goal), make_run("done", second=2.0, changes=goal)]
    assert next(iter(board(*runs))) == "done"


def test_the_cost_is_train_seconds_over_the_median_seconds_of_a_step_of_the_baseline(make_run, baseline):
    steps = [baseline(f"base-{second}", second=second, track="embedded") for second in (2.0, 3.0, 9.0)]
    rows = board(*steps, make_run("fast", second=1.5))
    assert rows["fast"]["baseline steps"] == "20.0"
    assert "speed-up" not in rows["fast"]


@pytest.mark.parametrize("other", [{"model.layers": 6, "name": "mine"}, {"plan.tokens_per_step": 131_072}])
def test_a_changed_baseline_is_no_baseline(baseline, other):
    assert board(baseline("a", changes=other))["a"]["baseline steps"] == "-"


def test_a_baseline_with_other_parameters_is_no_baseline(baseline):
    assert board(baseline("a", parameters=1000))["a"]["baseline steps"] == "-"


def test_a_baseline_of_another_device_does_not_count(make_run, baseline):
    other = baseline("base", track="embedded", device={"name": "another", "memory": 1})
    groups = make_groups([read_run(other), read_run(make_run("mine"))])
    assert [group.baseline_step for group in groups] == [1.0, None]


def test_on_the_official_track_the_speed_up_is_told_once_the_target_is_met(make_run, baseline):
    rows = board(
        baseline("base", second=2.0, loss=5.0),
        make_run("met", track="nocap", second=11.92, loss=3.38),
        make_run("missed", track="nocap", second=1.0, loss=3.3822),
    )
    assert rows["met"]["speed-up"] == "20.00x"
    assert rows["missed"]["speed-up"] == rows["base"]["speed-up"] == "-"


def test_seeds_of_a_recipe_share_its_colour_and_other_recipes_have_names_of_their_own(make_run):
    runs = [
        make_run("a"), make_run("b", seed=1), make_run("c", changes={"model.layers": 4, "model.dim": 96}),
        make_run("d", changes={"name": "other", "model.layers": 8}),
    ]  # fmt: skip
    (group,) = make_groups([read_run(path) for path in runs])
    assert [entry.variant.colour for entry in group.entries] == [0, 0, 1, 2]
    assert [variant.label for variant in group.variants] == ["tiny", "tiny · layers=4, dim=96", "other"]


def test_recipes_are_told_apart_from_the_baseline_wherever_it_stands(make_run, baseline):
    runs = [make_run("a", track="nocap"), baseline("b")]
    (group,) = make_groups([read_run(path) for path in runs])
    assert [variant.label for variant in group.variants] == ["nocap", "tiny"]
    assert group.variants[0].changes == ()


def said(*paths):
    (group,) = make_groups([read_run(path) for path in paths])
    return " ".join(remarks(group))


def test_what_cannot_be_known_is_said(make_run):
    assert "The cost in baseline steps is not known" in said(make_run("a"))
    assert "not the official one" in said(make_run("b"))


def test_one_seed_each_is_said_to_prove_nothing(make_run):
    one, other = make_run("a"), make_run("b", changes={"model.layers": 4})
    assert "proves nothing" in said(one, other)
    assert "proves nothing" not in said(one, other, make_run("c", seed=1))
    assert "proves nothing" not in said(one)
