import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from sabrage.bench.result import write_result
from sabrage.bench.step import COLUMNS
from sabrage.report.figure import stale_figures, write_figures
from sabrage.report.tables import read_result, table
from sabrage.run.folder import RunFolder, read_run, write_json
from sabrage.study.plan import StudyError
from sabrage.study.race_table import baseline_seconds, main, race_table, read_peer, sentences
from sabrage.train.loop import train
from sabrage.train.world import World

PEER = {"recipe": "a peer", "rows": [{"tokens": 100, "train_seconds": 0.5, "loss": 5.0, "note": ""}]}


@pytest.fixture
def races(tiny, one_thread, tmp_path):
    """A folder of three runs: two seeds that went to their end, and one that has not."""
    folder = tmp_path / "runs"
    for seed in (1, 0):
        recipe = replace(tiny, budget=replace(tiny.budget, seed=seed))
        run = RunFolder(folder / f"demo--seed-{seed}").create()
        train(recipe, folder=run, corpus=recipe.data.open(), world=World(torch.device("cpu")))
    (folder / "demo--seed-2").mkdir()
    half = json.loads((folder / "demo--seed-0" / "manifest.json").read_text())
    write_json(folder / "demo--seed-2" / "manifest.json", half)
    return folder


def time_baseline(races, seed, *, milliseconds, device=None):
    """What `bench step nocap` leaves beside a run."""
    run = read_run(races / f"demo--seed-{seed}")
    rows = [{"recipe": "nocap", "step_ms": milliseconds}]
    path = races / f"demo--seed-{seed}.nocap.json"
    device = device or run.manifest["device"]["name"]
    write_result(path, name="steps", device=device, columns=COLUMNS, rows=rows)


def test_each_run_is_a_row_with_its_clocks_and_its_cost_in_baseline_steps(races):
    time_baseline(races, 0, milliseconds=100.0)
    made = race_table(races, name="race")
    first, second, mean = made["rows"]
    ended = json.loads((races / "demo--seed-0" / "result.json").read_text())
    assert (first["recipe"], first["seed"], second["seed"]) == ("demo", 0, 1)
    for key in ("steps", "tokens", "train_seconds", "nocap_seconds", "wall_seconds", "warmup_seconds"):
        assert first[key] == ended[key]
    assert first["loss"] == ended["validation_loss"]
    assert first["base_steps"] == pytest.approx(ended["train_seconds"] / 0.1)
    assert second["base_steps"] is None
    assert "base_steps" not in mean
    assert made["seeds"] == [0, 1]


def test_the_whole_curve_is_kept_and_drawn(races, tmp_path):
    write_json(tmp_path / "peer.json", PEER)
    made = race_table(races, name="race", peers=[tmp_path / "peer.json"])
    assert list(made["curves"]) == ["demo, seed 0", "demo, seed 1", "a peer"]
    validations = read_run(races / "demo--seed-0").events("validation")
    assert [point["tokens"] for point in made["curves"]["demo, seed 0"]] == [512, 1024, 1536]
    for point, record in zip(made["curves"]["demo, seed 0"], validations, strict=True):
        assert point == {key: record[key] for key in ("tokens", "train_seconds", "loss")}
    seconds, tokens = (chart["lines"]["a peer"] for chart in made["charts"])
    assert (seconds, tokens) == ([(0.5, 5.0)], [(100.0, 5.0)])


def test_runs_that_did_not_end_are_told_and_left_out(races):
    assert race_table(races, name="race")["notes"][-1] == "demo--seed-2 is left out: not ended"
    for seed in (0, 1):
        path = races / f"demo--seed-{seed}" / "result.json"
        write_json(path, json.loads(path.read_text()) | {"ending": "interrupted"})
    with pytest.raises(
        StudyError, match=r"holds no run that went to its end.*seed-1 is left out: interrupted"
    ):
        race_table(races, name="race")


def test_a_baseline_of_another_card_is_no_measure(races):
    run = read_run(races / "demo--seed-0")
    time_baseline(races, 0, milliseconds=None)
    assert baseline_seconds(run) is None
    time_baseline(races, 0, milliseconds=100.0, device="another card")
    with pytest.raises(StudyError, match="was timed on another card"):
        baseline_seconds(run)


def test_a_recipe_is_summed_up_over_its_seeds():
    rows = [
        {"recipe": "fast", "loss": loss, "train_seconds": seconds, "base_steps": cost}
        for loss, seconds, cost in ((3.0, 100.0, 50.0), (4.0, 200.0, 150.0))
    ]
    rows.append({"recipe": "base", "loss": 4.5, "train_seconds": 10.0, "base_steps": None})
    assert sentences(rows) == [
        "fast: mean loss 3.5000 (n=2) after 150.0 s of training, 100.0 baseline steps",
        "base: mean loss 4.5000 (n=1) after 10.0 s of training",
    ]


def test_several_seeds_have_a_mean_and_say_how_sure_it_is_that_it_meets_the_target(races, tiny):
    for seed in (0, 1):
        time_baseline(races, seed, milliseconds=100.0)
    first, second, _ = race_table(races, name="race")["rows"]
    middle, half = (first["loss"] + second["loss"]) / 2, abs(first["loss"] - second["loss"]) / 2
    assert half > 0
    made = race_table(races, name="race", target=middle + half)
    mean = made["rows"][-1]
    assert mean["recipe"] == "demo, mean of 2"
    assert (mean["steps"], mean["tokens"]) == (first["steps"], first["tokens"])
    assert mean["loss"] == pytest.approx(middle)
    assert mean["sd"] == pytest.approx(half * 2**0.5)
    assert mean["base_steps"] == pytest.approx((first["base_steps"] + second["base_steps"]) / 2)
    # Student's t of one degree of freedom at 1 is a quarter of a turn.
    assert mean["p"] == pytest.approx(0.25)
    assert f"p of loss <= {middle + half}" in table(made)
    assert "p of loss" not in table(race_table(races, name="race"))
    (races / "demo--seed-1" / "result.json").unlink()
    assert [row["recipe"] for row in race_table(races, name="race", target=1.0)["rows"]] == ["demo"]


def test_the_command_writes_a_result_that_becomes_a_table_and_a_chart(races, tmp_path, capsys):
    for seed in (0, 1):
        time_baseline(races, seed, milliseconds=100.0)
    write_json(tmp_path / "peer.json", PEER)
    out = tmp_path / "results" / "race.json"
    main([str(races), "--out", str(out), "--peer", str(tmp_path / "peer.json"), "--commit", "abc"])
    said = capsys.readouterr().out
    assert said.count("recipe=demo") == 3
    assert "- demo: mean loss" in said
    result = read_result(out)
    assert "| demo | 0 | 12 | 1,536 |" in table(result)
    assert list(stale_figures(tmp_path)) == [out.with_suffix(".svg")]
    assert write_figures(tmp_path) == [out.with_suffix(".svg")]
    assert list(stale_figures(tmp_path)) == []
    drawn = ElementTree.parse(out.with_suffix(".svg"))
    names = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    # Two charts, each with a legend.
    assert names.count("a peer") == names.count("demo, seed 1") == 2


def test_a_folder_without_runs_is_refused_with_the_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "race.json")])
    assert "give the folder of the runs" in capsys.readouterr().err


def test_a_peer_without_a_curve_is_refused(tmp_path):
    write_json(tmp_path / "peer.json", {"recipe": "a peer", "rows": [{"tokens": 1}]})
    with pytest.raises(StudyError, match="lacks 'train_seconds'"):
        read_peer(tmp_path / "peer.json")
