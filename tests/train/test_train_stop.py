import errno
import math
import os
from dataclasses import replace

import pytest
import torch

from sabrage.blend.blend import Blend
from sabrage.config import override
from sabrage.objective.next_token import NextTokenLoss
from sabrage.optim.adamw import AdamW
from sabrage.run import checkpoint
from sabrage.run.checkpoint import load_newest
from sabrage.run.folder import read_run
from sabrage.run.log import read_log
from sabrage.train.loop import TrainingStopped, check_data
from sabrage.train.world import World


def poison(monkeypatch, *, call):
    """Makes the training loss NaN at its `call`-th computation, counted from 0."""
    plain, calls = NextTokenLoss.forward, []

    def forward(self, *arguments):
        loss = plain(self, *arguments)
        calls.append(1)
        return replace(loss, total=loss.total * math.nan) if len(calls) == call + 1 else loss

    monkeypatch.setattr(NextTokenLoss, "forward", forward)


def test_a_loss_that_is_not_a_number_names_the_step_the_last_good_checkpoint_and_what_to_try(
    tiny, run_recipe, monkeypatch, tmp_path
):
    poison(monkeypatch, call=7)
    with pytest.raises(
        TrainingStopped, match=r"loss of step 7 is not finite; the last good.* step 4 .*--set"
    ):
        run_recipe(override(tiny, "budget.checkpoint_every=4"))
    run = read_run(tmp_path / "run")
    assert [record["step"] for record in run.events("not_finite")] == [7]
    assert (run.result["ending"], run.result["steps"]) == ("not_finite", 8)
    assert load_newest(tmp_path / "run" / "checkpoints", warn=pytest.fail).step == 4


def test_without_any_checkpoint_the_message_says_so(tiny, run_recipe, monkeypatch):
    poison(monkeypatch, call=0)
    with pytest.raises(TrainingStopped, match="loss of step 0 is not finite; there is no checkpoint"):
        run_recipe(tiny)


@pytest.mark.parametrize("state", ["weight", "moment"])
def test_weights_or_moments_that_are_not_finite_are_never_saved(
    tiny, run_recipe, monkeypatch, tmp_path, state
):
    # The loss of a step is known before its update, so only a look at the weights shows this.
    plain = torch.optim.AdamW.step
    steps = []

    def step(self, *arguments):
        plain(self, *arguments)
        steps.append(1)
        if len(steps) == 8:
            parameter = self.param_groups[0]["params"][0]
            broken = parameter if state == "weight" else self.state[parameter]["exp_avg_sq"]
            with torch.no_grad():
                broken[3, 5] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingStopped, match=r"the weights after 8 steps are not finite; .* of step 4 "):
        run_recipe(override(tiny, "budget.checkpoint_every=4"))
    assert load_newest(tmp_path / "run" / "checkpoints", warn=pytest.fail).step == 4


def test_an_absurd_learning_rate_stops_the_run(tiny, run_recipe):
    with pytest.raises(TrainingStopped, match="Try a lower learning rate"):
        run_recipe(replace(tiny, optim=(replace(tiny.optim[0], optimizer=AdamW(lr=1e38)),)))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny, run_recipe, monkeypatch, tmp_path, capsys):
    plain = checkpoint.save_file

    def save_file(tensors, path):
        if "step-00000008" in str(path):
            path.write_bytes(b"cut off")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    kept = []
    plain_message = checkpoint.save

    def save(folder, **options):
        try:
            return plain_message(folder, **options)
        finally:
            kept.append(sorted(path.name for path in folder.iterdir()))

    monkeypatch.setattr(checkpoint, "save", save)
    outcome, run = run_recipe(override(tiny, "budget.checkpoint_every=4"))
    assert (outcome.ending, outcome.steps) == ("done", 12)
    assert kept == [["step-00000004"], ["step-00000004"], ["step-00000004", "step-00000012"]]
    assert [record["step"] for record in run.events("checkpoint_failed")] == [8]
    assert [record["step"] for record in run.events("checkpoint")] == [4, 12]
    assert "no checkpoint at step 8: " in capsys.readouterr().out


def test_the_target_ends_the_run_at_the_first_validation_at_or_below_it(tiny, run_recipe):
    _, whole = run_recipe(tiny, name="whole")
    losses = [(record["step"], record["loss"]) for record in whole.events("validation")]
    assert [step for step, _ in losses] == [4, 8, 12]
    assert losses[1][1] < losses[0][1]
    outcome, run = run_recipe(override(tiny, f"budget.target={losses[1][1]!r}"), name="aimed")
    assert (outcome.ending, outcome.steps, outcome.validation_loss) == ("target", 8, losses[1][1])
    assert (run.result["ending"], run.result["steps"]) == ("target", 8)
    assert load_newest(run.path / "checkpoints", warn=pytest.fail).step == 8


def test_a_run_until_a_step_is_the_beginning_of_the_whole(tiny, run_recipe, capsys):
    # The rate rises to the end of what is taken and falls after it.
    recipe = replace(
        override(tiny, 'plan.lr={"part": "Trapezoid", "warmup": 2, "warmdown": 5}'), blend=Blend()
    )
    _, whole = run_recipe(replace(recipe, blend=None), name="whole")
    outcome, run = run_recipe(override(recipe, "budget.until=7"))
    assert (outcome.ending, outcome.steps, run.result["ending"]) == ("until", 7, "until")
    parts = [
        [(record["step"], record["loss"], record["lr"]) for record in each.events("train")]
        for each in (run, whole)
    ]
    assert len(parts[1]) == 12
    assert parts[0] == parts[1][:7]
    assert [record["step"] for record in run.events("validation")] == [4, 7]
    # The blend is for the end, which this run does not reach.
    assert run.result["validation_loss"] == outcome.validation_loss
    assert not run.events("blend")
    assert load_newest(run.path / "checkpoints", warn=pytest.fail).step == 7
    assert "step 7/7" in capsys.readouterr().out


@pytest.mark.parametrize("until", ["null", "8"])
def test_a_finished_run_that_is_resumed_keeps_its_result(tiny, run_recipe, until):
    tiny = override(tiny, f"budget.until={until}")
    first, before = run_recipe(tiny)
    again, after = run_recipe(tiny, resume=True)
    assert after.result == before.result
    assert (again.ending, again.validation_loss) == (first.ending, first.validation_loss)


def test_rows_that_cannot_be_shared_by_the_processes_are_refused_before_anything_compiles(tiny):
    with pytest.raises(ValueError, match="4 rows of 32 tokens cannot be shared by 3 ranks"):
        check_data(tiny, tiny.data.open(), World(torch.device("cpu"), rank=0, size=3))


def test_token_ids_that_the_model_does_not_have_are_refused_with_the_remedy(tiny):
    corpus = replace(tiny.data.open(), vocab_size=500)
    with pytest.raises(ValueError, match=r"500 token ids and the model 257; use --set model.vocab_size=500"):
        check_data(tiny, corpus, World(torch.device("cpu")))


def test_the_log_counts_every_step_and_token_once(tiny, run_recipe, tmp_path):
    _, run = run_recipe(tiny)
    assert [record["step"] for record in run.events("train")] == list(range(12))
    assert run.events("speed")[-1]["tokens"] == run.result["tokens"] == 12 * 128
    assert read_log(tmp_path / "run" / "log.jsonl") == run.records
