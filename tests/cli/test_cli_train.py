import fcntl
import importlib.util
import json

import pytest

from sabrage.cli import main
from sabrage.config import from_json
from sabrage.run.folder import read_run
from sabrage.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(tmp_path, tiny_options, monkeypatch):
    """train(*options) -> the exit status of `sabrage train demo` with the tiny recipe, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: main(["train", "demo", *tiny_options, *options])


def test_a_run_leaves_everything_in_its_folder_and_says_where(train, tiny, tmp_path, capsys):
    assert train("--out", "run") == 0
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {"manifest.json", "log.jsonl", "checkpoints", "result.json", "report.html"}
    run = read_run(tmp_path / "run")
    recipe = from_json(run.manifest["recipe"])
    assert (recipe.model, recipe.optim, recipe.plan) == (tiny.model, tiny.optim, tiny.plan)
    assert (run.result["ending"], run.result["steps"]) == ("done", 12)
    text = capsys.readouterr().out
    assert "12 steps, 1,536 tokens" in text
    assert f"validation loss {run.result['validation_loss']:.4f} nats a token" in text
    assert "run folder: run" in text
    assert "loss curve: run/report.html" in text


def test_without_out_every_run_gets_a_folder_of_its_own(train, tmp_path):
    assert [train("--steps", "1"), train("--steps", "1")] == [0, 0]
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("demo-") for name in names)


def test_shortcuts_change_the_recipe_that_the_manifest_records(train, tmp_path):
    assert (
        train("--out", "run", "--seed", "3", "--steps", "5", "--target", "0.5", "--set", "budget.log_every=1")
        == 0
    )
    run = read_run(tmp_path / "run")
    recipe = from_json(run.manifest["recipe"])
    assert (recipe.budget.seed, recipe.plan.steps, recipe.budget.target) == (3, 5, 0.5)
    assert (recipe.budget.log_every, run.manifest["seed"]) == (1, 3)
    assert len(run.events("train")) == 5


def test_the_target_ends_the_run_with_success(train, tmp_path):
    assert train("--out", "run", "--target", "9.9") == 0
    assert read_run(tmp_path / "run").result["ending"] == "target"


def test_a_folder_with_a_run_is_refused_with_the_remedy_and_left_alone(train, tmp_path, capsys):
    assert train("--out", "run", "--steps", "2") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train("--out", "run") == 1
    error = capsys.readouterr().err
    assert "run holds a run already; choose another folder, or resume" in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_something_else_is_refused(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    assert train("--out", "run") == 1
    assert "run is neither empty nor a run" in capsys.readouterr().err


def test_resume_without_a_folder_takes_the_newest_run_of_the_recipe(train, tmp_path, capsys):
    assert train("--out", "runs/older", "--steps", "2") == 0
    manifest = tmp_path / "runs" / "older" / "manifest.json"
    manifest.write_text(
        json.dumps(json.loads(manifest.read_text()) | {"started": "2001-01-01T00:00:00+00:00"})
    )
    assert train("--out", "runs/newer", "--steps", "2") == 0
    capsys.readouterr()
    assert main(["train", "demo", "--resume"]) == 0
    assert "run folder: runs/newer" in capsys.readouterr().out


def test_resuming_a_run_of_another_recipe_is_refused(train, capsys):
    assert train("--out", "run", "--steps", "2") == 0
    assert main(["train", "nocap", "--resume", "--out", "run"]) == 1
    assert "run is a run of 'demo', not of 'nocap'" in capsys.readouterr().err


def test_a_run_that_ended_at_its_target_can_go_on_to_the_end(train, tmp_path):
    assert train("--out", "run", "--target", "9.9") == 0
    assert main(["train", "demo", "--resume", "--out", "run", "--target", "0"]) == 0
    run = read_run(tmp_path / "run")
    assert (run.result["ending"], run.result["steps"]) == ("done", 12)
    assert [record["step"] for record in run.events("train")] == list(range(12))


def test_a_loss_that_is_not_finite_is_told_in_a_sentence_and_exits_with_1(train, tmp_path, capsys):
    assert train("--out", "run", "--set", "optim.0.optimizer.lr=1e38") == 1
    error = capsys.readouterr().err
    assert error.startswith("sabrage: the loss of step ")
    assert "Try a lower learning rate (--set optim.0.optimizer.lr=...)" in error
    assert read_run(tmp_path / "run").result["ending"] == "not_finite"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_begins(
    train, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert train("--out", "run", "--tracker", "wandb") == 1
    assert "pip install 'sabrage[track]'" in capsys.readouterr().err
    assert train("--out", "run", "--steps", "1") == 0


def test_data_that_is_not_there_names_the_command_that_fetches_it(train, capsys):
    assert train("--set", "data.path=nowhere") == 1
    assert "nowhere: no such folder; fetch FineWeb with `sabrage data fineweb" in capsys.readouterr().err


def test_eval_gives_the_loss_of_the_run_and_of_other_lengths(train, tmp_path, capsys):
    assert train("--out", "run") == 0
    loss = read_run(tmp_path / "run").result["validation_loss"]
    capsys.readouterr()
    assert main(["eval", "run", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"validation loss {loss:.5f} nats a token over 500 targets, track own")
    assert main(["eval", "run", "--device", "cpu", "--tokens", "100", "--length", "50"]) == 0
    assert "over 100 targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "5000"], "2,000 tokens"),
        (["--tokens", "0"], "at least 1"),
        (["--length", "0"], "at least 1"),
    ],
)
def test_eval_refuses_what_cannot_be_scored(train, capsys, options, message):
    assert train("--out", "run", "--steps", "1") == 0
    assert main(["eval", "run", "--device", "cpu", *options]) == 1
    assert message in capsys.readouterr().err


def test_eval_of_a_run_without_a_checkpoint_says_so(train, tmp_path, capsys):
    assert train("--out", "run", "--set", "optim.0.optimizer.lr=1e38") == 1
    assert main(["eval", "run", "--device", "cpu"]) == 1
    assert "no checkpoint in run/checkpoints; train the run to its end first" in capsys.readouterr().err


def test_who_takes_turns_holds_the_device_and_tells_no_other_clock(train, tmp_path, monkeypatch):
    file, free = tmp_path / "gpu.turn", []

    def steps(*words):
        with file.open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free.append(False)
        return run_steps(*words)

    run_steps = loop.run_steps
    monkeypatch.setattr(loop, "run_steps", steps)
    monkeypatch.setenv("SABRAGE_TURN", str(file))
    assert train("--out", "run") == 0
    assert free == [False]
    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    run = read_run(tmp_path / "run")
    assert run.inline
    assert run.result["wall_seconds"] is None
