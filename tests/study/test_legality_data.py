"""Validation that is not scored as it says, and training that uses it, must be caught."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import tyro
from contracts import shrink

from sabrage.attention.multi_head import MultiHead
from sabrage.cli.check import Check
from sabrage.config import ConfigError, override
from sabrage.context import Context
from sabrage.data.shards import write_shard
from sabrage.data.stream import ShardStream
from sabrage.feedforward.mlp import Mlp, Perceptron
from sabrage.parts import Batch
from sabrage.plan import Constant, Plan
from sabrage.precision.fp8 import Fp8
from sabrage.recipe import Budget
from sabrage.recipes import RECIPES
from sabrage.run.folder import RunFolder, read_run
from sabrage.study.legality import (
    check_data,
    check_full,
    check_model,
    check_scoring,
    check_targets,
    check_unseen,
    contains,
    first_batch,
)
from sabrage.train.evaluate import Evaluator
from sabrage.train.loop import train
from sabrage.train.world import World

VOCABULARY = 97
CPU = torch.device("cpu")


def tokens_of(seed, count):
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).astype(np.uint16)


def tiny(path="nowhere"):
    recipe = RECIPES["nocap"]
    return replace(
        recipe,
        data=replace(recipe.data, path=str(path), vocab_size=VOCABULARY, block_tokens=64),
        model=replace(
            recipe.model,
            layers=2,
            dim=16,
            vocab_size=VOCABULARY,
            mixers=(MultiHead(heads=2),),
            feedforwards=(Mlp(expansion=1),),
        ),
        plan=Plan(steps=2, lr=Constant(), tokens_per_step=128, sequence_length=32),
        precision=RECIPES["demo"].precision,
        budget=Budget(evaluate_every=0, evaluation_tokens=500, evaluation_length=32),
    )


@pytest.fixture
def data(tmp_path):
    """A folder with one training and one validation shard that have nothing in common."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder / "a_train_0.bin", tokens_of(0, 4000))
    write_shard(folder / "a_val_0.bin", tokens_of(1, 1000))
    return folder


class Spoiled(Evaluator):
    """An evaluator whose batches are changed by `spoil(tokens, targets)`."""

    def batches(self):
        for tokens, targets in super().batches():
            yield from self.spoil(tokens, targets)


def spoiled(spoil):
    return type("Made", (Spoiled,), {"spoil": staticmethod(spoil)})


def scoring(evaluator=Evaluator):
    return check_scoring(tiny(), tokens_of(1, 1000), evaluator=evaluator)


def test_the_evaluator_scores_every_target_once():
    assert scoring().passed
    assert scoring().detail == "500 targets, each once and in order"


def test_a_target_scored_twice_is_caught():
    found = scoring(spoiled(lambda tokens, targets: [(tokens, targets)] * 2))
    assert (found.passed, found.detail) == (False, "1,000 targets are scored where the budget has 500")


def test_a_target_left_out_of_each_batch_is_caught():
    def spoil(tokens, targets):
        targets[0, 3] = -1
        return [(tokens, targets)]

    assert scoring(spoiled(spoil)).detail == "498 targets are scored where the budget has 500"


def test_validation_targets_that_are_the_inputs_are_caught():
    def spoil(tokens, targets):
        return [(tokens, torch.where(targets >= 0, tokens, -1))]

    assert scoring(spoiled(spoil)).detail == "the target at 0 is not the next validation token"


def test_inputs_that_show_the_target_are_caught():
    def spoil(tokens, targets):
        return [(torch.where(targets >= 0, targets, 0), targets)]

    assert scoring(spoiled(spoil)).detail == "the input at 0 is not the token before its target"


def test_scoring_in_train_mode_is_caught():
    class InTrainMode(Evaluator):
        def score(self, *given):
            self.model.train()
            return super().score(*given)

    assert scoring(InTrainMode).detail == "the model is scored in train mode"


def test_targets_of_unequal_weight_are_caught():
    class Heavier(Evaluator):
        def __call__(self):
            return super().__call__() * 1.001

    assert scoring(Heavier).detail.startswith("the targets do not weigh the same")


class ByTargets(Evaluator):
    """Tells documents apart one token too early: the mask of an input shows that its target is the last."""

    def score(self, tokens_BT, targets_BT, window=None, layers=None):
        documents_BT = (targets_BT == self.end_of_text).cumsum(1)
        h_BTD = self.model(tokens_BT, Context(documents_BT=documents_BT))
        return self.model.head.loss(h_BTD, targets_BT)


@pytest.mark.parametrize(("evaluator", "passed"), [(Evaluator, True), (ByTargets, False)])
def test_documents_in_validation_must_show_in_the_inputs_so_far(evaluator, passed):
    recipe = override(tiny(), "budget.evaluation_documents=true")
    found = check_scoring(recipe, tokens_of(1, 1000), evaluator=evaluator, end_of_text=VOCABULARY - 1)
    assert found.passed is passed
    assert ("more than the ends of text" in found.detail) is not passed


def batch(shift):
    row = torch.arange(40).reshape(2, 20)
    return Batch(row, row + shift)


def test_training_targets_are_the_next_tokens():
    assert check_targets(batch(1)).passed


@pytest.mark.parametrize("shift", [0, 2, -1])
def test_shifted_training_targets_are_caught_with_their_offset(shift):
    found = check_targets(batch(shift))
    assert not found.passed
    assert found.detail.endswith(f"all are shifted, target t is input t{shift:+d}")


def test_one_wrong_training_target_is_caught():
    wrong = batch(1)
    wrong.targets_BT[1, 4] += 1
    assert check_targets(wrong).detail == "the target at 4 of row 1 is not the next input"


def test_masked_training_targets_are_left_alone():
    masked = batch(1)
    masked.targets_BT[1, 4] = -1
    assert check_targets(masked).passed


@pytest.mark.parametrize("order", ["masked", "documents"])
def test_a_recipe_over_documents_passes_as_a_whole(data, order):
    recipe = override(override(tiny(data), f"data.order={order}"), "budget.evaluation_documents=true")
    corpus = recipe.data.open()
    assert check_data(recipe, corpus).passed
    wrong = first_batch(recipe, corpus)
    wrong.targets_BT[1, 4] += 1
    wrong.documents_BT[1] = 0
    assert not check_targets(wrong).passed


def test_other_data_is_unseen():
    stream = ShardStream([tokens_of(0, 4000)], block_tokens=64)
    assert check_unseen(stream, tokens_of(1, 1000)).passed


def test_validation_tokens_in_the_training_stream_are_caught():
    train = np.concatenate([tokens_of(0, 1024), tokens_of(1, 1000), tokens_of(2, 1024)])
    stream = ShardStream([train], block_tokens=256)
    found = check_unseen(stream, tokens_of(1, 1000))
    assert not found.passed
    assert found.detail.startswith("32 of 32 stretches of 64 tokens")


@pytest.mark.parametrize(("copied", "passed"), [(4, True), (5, False), (13, False)])
def test_up_to_an_eighth_of_the_stretches_may_be_repetitions(copied, passed):
    validation = tokens_of(1, 32 * 64)
    train = np.concatenate([tokens_of(0, 1024), validation[: copied * 64], tokens_of(2, 1024)])
    found = check_unseen(ShardStream([train], block_tokens=256), validation)
    assert found.passed is passed
    assert found.detail.startswith(f"{copied} of 32 stretches")


def test_contains_finds_a_window_at_both_ends_and_not_beyond():
    tokens = tokens_of(3, 200)
    for start in (0, 77, 136):
        assert contains(tokens, tokens[start : start + 64])
    assert not contains(tokens[:-1], tokens[136:])
    assert not contains(tokens[1:], tokens[:64])


def test_a_recipe_and_its_data_pass_as_a_whole(data):
    recipe = tiny(data)
    assert check_data(recipe, recipe.data.open()).passed
    assert check_model(recipe).passed
    assert check_full(recipe, CPU).passed


def test_the_full_form_knows_layers_by_the_names_they_train_under():
    recipe = shrink(RECIPES["base"])
    assert check_full(replace(recipe, precision=Fp8(products=(r"^model\.head$",))), CPU).passed
    with pytest.raises(ConfigError, match="matches no layer"):
        check_full(replace(recipe, precision=Fp8(products=(r"^head$",))), CPU)


class PeekingPerceptron(Perceptron):
    def forward(self, x_BTD, context):
        return super().forward(x_BTD.roll(-1, 1), context)


@dataclass(frozen=True, kw_only=True)
class Peeking(Mlp):
    def build(self, *, dim, layer):
        return PeekingPerceptron(self, dim=dim)


def test_train_records_the_verdict_before_its_first_step(data, tmp_path):
    recipe, folder = tiny(data), RunFolder(tmp_path / "run")
    train(recipe, folder=folder, corpus=recipe.data.open(), world=World(CPU))
    recorded = read_run(folder.path).manifest["legality"]
    assert recorded == check_model(recipe).to_json()
    assert recorded["passed"]


def test_train_refuses_a_model_that_leaks(data, tmp_path):
    recipe = tiny(data)
    recipe = replace(recipe, model=replace(recipe.model, feedforwards=(Peeking(expansion=1),)))
    with pytest.raises(ConfigError, match=r"feedforward \(Peeking\) leaks"):
        train(recipe, folder=RunFolder(tmp_path / "run"), corpus=recipe.data.open(), world=World(CPU))
    assert not (tmp_path / "run").exists()


def check(*words):
    return tyro.cli(Check, args=words).run()


def test_the_command_checks_a_run_and_its_checkpoint(data, tmp_path, capsys):
    recipe, folder = tiny(data), tmp_path / "run"
    train(recipe, folder=RunFolder(folder), corpus=recipe.data.open(), world=World(CPU))
    assert check(str(folder), "--full", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert shown.count("causality by gradient") == 2
    assert "full size, Fp32" in shown
    assert "fails" not in shown


def test_the_command_ends_with_1_when_a_check_fails(data, tmp_path, capsys):
    write_shard(data / "a_train_0.bin", np.concatenate([tokens_of(0, 1024), tokens_of(1, 1000)]))
    recipe, folder = tiny(data), RunFolder(tmp_path / "run")
    train(recipe, folder=folder, corpus=recipe.data.open(), world=World(CPU))
    assert check(str(folder.path)) == 1
    assert "fails" in capsys.readouterr().out


def test_the_command_says_when_there_is_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check("base", "--set", "model.layers=2") == 0
    assert "its use is not checked" in capsys.readouterr().out


def test_a_run_takes_no_changes(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="leave out --set"):
        check(str(tmp_path), "--set", "model.layers=2")


class FarSighted(Perceptron):
    """Sees the next token, and only where the plan has a window."""

    def forward(self, x_BTD, context):
        return super().forward(x_BTD if context.window is None else x_BTD.roll(-1, 1), context)


@dataclass(frozen=True, kw_only=True)
class Windowed(Mlp):
    def build(self, *, dim, layer):
        return FarSighted(self, dim=dim)


def test_a_model_is_examined_through_the_window_of_its_plan():
    recipe = tiny()
    recipe = replace(recipe, model=replace(recipe.model, feedforwards=(Windowed(expansion=1),)))
    assert check_model(recipe).passed
    windowed = replace(recipe, plan=replace(recipe.plan, window=16))
    assert not check_model(windowed).passed
    assert not check_full(windowed, CPU).passed
