"""A run that ends with a blend: what it counts, what it says, and how it is read back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.config import ConfigError, from_json, to_json
from sabrage.train import blended
from sabrage.train.loop import build_learner, make_evaluator
from sabrage.train.world import World

SMALL = Blend(held_out=1500, hidden=8, steps=60, batch=256)
CANDIDATES = Candidates(followers=2, likeliest=4, hidden=8)
# Contexts with gaps, and with classes of tokens.
KINDS = replace(CANDIDATES, gaps=((3, 1), (-3, -2, 1)), classes=9)


@pytest.fixture
def blending(tiny):
    return replace(tiny, blend=SMALL)


def test_the_last_validation_is_of_the_mixture_and_the_network_is_told_beside_it(run_recipe, tiny, blending):
    _, plain = run_recipe(tiny, name="plain")
    outcome, run = run_recipe(blending)
    result = run.result
    assert result["network_loss"] == pytest.approx(plain.result["validation_loss"], abs=1e-5)
    # The pattern of this text is in its counts, and twelve steps of a network have not seen it.
    assert outcome.validation_loss == result["validation_loss"] < result["network_loss"] - 0.1
    told = [record for record in run.records if record["event"] == "validation"]
    assert [("network_loss" in record) for record in told] == [False, False, True]
    assert "network_loss" not in plain.result
    (spent,) = run.events("blend")
    stages = [spent[f"{name}_seconds"] for name in ("counting", "looking", "fitting")]
    assert 0 < sum(stages) <= result["train_seconds"]
    checks = {check["name"]: check["passed"] for check in run.manifest["legality"]["checks"]}
    assert checks["blend"]


def test_weights_are_those_of_a_run_without_it(run_recipe, tiny, blending):
    losses = []
    for recipe in (tiny, blending):
        _, run = run_recipe(recipe, name=f"run-{recipe.blend is None}")
        losses.append([record["loss"] for record in run.records if record["event"] == "train"])
    assert losses[0] == losses[1]


@pytest.fixture
def parts(blending, one_thread):
    """(corpus, evaluator) of the recipe with untrained weights."""
    corpus, world = blending.data.open(), World(torch.device("cpu"))
    learner = build_learner(blending, world)
    return corpus, make_evaluator(blending, learner.model, world, corpus, micro_tokens=128)


def test_what_was_trained_on_is_counted_and_what_follows_is_for_the_gate(monkeypatch, blending, parts):
    corpus, evaluator = parts
    counted, fitted = [], []
    monkeypatch.setattr(blended, "Grams", lambda text_N, *_: counted.append(text_N))
    monkeypatch.setattr(blended.Blended, "fit", lambda self, text, seed: fitted.append(text))
    blended.blend(blending, evaluator, corpus, 12, say=print)
    stream = corpus.train.shards[0].astype(np.int64)
    assert np.array_equal(counted[0].numpy(), stream[: 12 * 128])
    assert np.array_equal(fitted[0], stream[12 * 128 : 12 * 128 + 1501])


def test_of_a_long_text_the_newest_is_counted(monkeypatch, blending, parts):
    corpus, evaluator = parts
    counted = []
    monkeypatch.setattr(blended, "Grams", lambda text_N, *_: counted.append(text_N))
    recipe = replace(blending, blend=replace(SMALL, text_tokens=3 * 128 + 5))
    blended.counted(recipe, evaluator, corpus, 12)
    assert np.array_equal(counted[0].numpy(), corpus.train.shards[0][9 * 128 : 12 * 128].astype(np.int64))


def test_text_that_was_not_trained_on_is_counted_as_well(monkeypatch, blending, parts):
    corpus, evaluator = parts
    counted, fitted = [], []
    monkeypatch.setattr(blended, "Grams", lambda text_N, *_: counted.append(text_N))
    monkeypatch.setattr(blended.Blended, "fit", lambda self, text, seed: fitted.append(text))
    recipe = replace(blending, blend=replace(SMALL, text_tokens=3 * 128, unseen_tokens=200))
    blended.blend(recipe, evaluator, corpus, 12, say=print)
    stream = corpus.train.shards[0].astype(np.int64)
    # 1,500 tokens of the gate take twelve blocks, 200 unseen ones two.
    expected = np.concatenate((stream[9 * 128 : 12 * 128], stream[24 * 128 : 26 * 128]))
    assert np.array_equal(counted[0].numpy(), expected)
    assert np.array_equal(fitted[0], stream[12 * 128 : 12 * 128 + 1501])


def test_unseen_tokens_must_be_there(run_recipe, blending):
    with pytest.raises(ConfigError, match=r"unseen_tokens=19,000 are only counted.*fewer unseen tokens"):
        run_recipe(replace(blending, blend=replace(SMALL, unseen_tokens=19_000)))
    assert SMALL.problems() == []
    assert replace(SMALL, unseen_tokens=-1).problems()
    assert replace(SMALL, unseen_tokens=5, text_orders=0).problems()


def test_a_run_out_of_memory_at_its_end_is_not_lost(run_recipe, monkeypatch, blending, capsys):
    def large(text_N, *_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(blended, "Grams", large)
    outcome, run = run_recipe(blending)
    assert outcome.ending == "done"
    assert "network_loss" not in run.result
    assert run.result["validation_loss"] == outcome.validation_loss
    assert "out of memory in blending" in capsys.readouterr().out
    assert not (run.path / blended.FILE).exists()
    assert list((run.path / "checkpoints").iterdir())


def test_every_target_is_scored_once_with_and_without_a_gate(blending, parts):
    corpus, evaluator = parts
    made = blended.blend(blending, evaluator, corpus, 12, say=print)
    _, alone = made.losses()
    assert alone == pytest.approx(evaluator(), abs=1e-5)
    assert sum(map(len, made.evidence())) == blending.budget.evaluation_tokens


NONE = {"text_orders": 0, "document_orders": 0, "seen": False, "cache": ()}


@pytest.mark.parametrize(
    "alone",
    [
        {"text_orders": 7},
        {"document_orders": 3},
        {"seen": True},
        {"cache": (9.0,)},
    ],
)
def test_each_kind_of_expert_helps_alone(blending, parts, alone):
    corpus, evaluator = parts
    recipe = replace(blending, blend=replace(SMALL, **NONE | alone))
    mixed, network = blended.blend(recipe, evaluator, corpus, 12, say=print).losses()
    assert mixed < network


@pytest.mark.parametrize("alone", [{"text_orders": 7}, {"document_orders": 3}, {"seen": True}])
def test_candidates_help_beside_each_kind_of_expert(blending, parts, alone):
    corpus, evaluator = parts
    losses = []
    for candidates in (None, CANDIDATES):
        recipe = replace(blending, blend=replace(SMALL, **NONE | alone, candidates=candidates))
        losses.append(blended.blend(recipe, evaluator, corpus, 12, say=print).losses())
    (plain, network), (rescored, same_network) = losses
    assert network == same_network
    assert rescored < plain


def test_classes_are_those_that_the_gate_was_fitted_with(tmp_path, blending, parts, monkeypatch):
    corpus, evaluator = parts
    recipe = replace(blending, blend=replace(SMALL, candidates=KINDS))
    made = blended.blend(recipe, evaluator, corpus, 12, say=print)
    assert made.classes_V.shape == (recipe.model.vocab_size,)
    assert 1 < len(made.classes_V.unique()) <= 9
    blended.save(tmp_path, made, step=12)
    monkeypatch.setattr(blended, "classes_of", lambda *_, **__: pytest.fail("found anew"))
    again = blended.load(tmp_path, recipe, evaluator, corpus, step=12)
    assert torch.equal(again.classes_V, made.classes_V)
    assert again.losses() == made.losses()


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [(None, CANDIDATES), (CANDIDATES, None), (CANDIDATES, replace(CANDIDATES, likeliest=5))],
)
def test_a_blend_with_other_candidates_is_refused(tmp_path, blending, parts, saved, wanted):
    corpus, evaluator = parts
    recipes = [replace(blending, blend=replace(SMALL, candidates=part)) for part in (saved, wanted)]
    blended.save(tmp_path, blended.blend(recipes[0], evaluator, corpus, 12, say=print), step=12)
    with pytest.raises(blended.CheckpointError, match=r"its gate was fitted with candidates=.*remove it"):
        blended.load(tmp_path, recipes[1], evaluator, corpus, step=12)


@pytest.mark.parametrize(
    "more",
    [{}, {"candidates": CANDIDATES}, {"candidates": replace(CANDIDATES, layers=2)}, {"candidates": KINDS}],
)
def test_a_blend_is_saved_and_read_back(tmp_path, blending, parts, more):
    corpus, evaluator = parts
    blending = replace(blending, blend=replace(SMALL, **more))
    made = blended.blend(blending, evaluator, corpus, 12, say=print)
    blended.save(tmp_path, made, step=12)
    assert [path.name for path in tmp_path.iterdir()] == [blended.FILE]
    again = blended.load(tmp_path, blending, evaluator, corpus, step=12)
    assert again.losses() == made.losses()
    assert blended.load(tmp_path, blending, evaluator, corpus, step=8) is None
    assert blended.load(tmp_path / "none", blending, evaluator, corpus, step=12) is None
    other = replace(blending, blend=replace(SMALL, text_orders=2, **more))
    with pytest.raises(ValueError, match="not the blend of this recipe"):
        blended.load(tmp_path, other, evaluator, corpus, step=12)
    (tmp_path / blended.FILE).write_bytes(b"\x09" * 40)
    with pytest.raises(ValueError, match="not the blend of this recipe"):
        blended.load(tmp_path, blending, evaluator, corpus, step=12)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, blending, parts):
    corpus, evaluator = parts
    made = blended.blend(blending, evaluator, corpus, 12, say=print)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blended, "save_file", full)
    with pytest.raises(ValueError, match="No space"):
        blended.save(tmp_path, made, step=12)
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_a_full_disk_still_tells_its_loss(run_recipe, monkeypatch, blending):
    def full(folder, made, *, step):
        raise blended.CheckpointError("the disk is full")

    monkeypatch.setattr("sabrage.train.recorder.save", full)
    outcome, run = run_recipe(blending)
    assert run.result["validation_loss"] == outcome.validation_loss < run.result["network_loss"]
    assert any(record["event"] == "checkpoint_failed" for record in run.records)


def test_tokens_for_the_gate_must_not_have_been_trained_on(run_recipe, blending):
    with pytest.raises(ConfigError, match=r"use fewer plan\.steps"):
        run_recipe(replace(blending, blend=replace(SMALL, held_out=19_000)))


def test_many_processes_are_refused(blending):
    with pytest.raises(ConfigError, match="one process"):
        blended.check_room(blending, blending.data.open(), World(torch.device("cpu"), 0, 2))


def test_a_recipe_with_a_blend_goes_to_json_and_back(blending, tiny):
    assert from_json(json.loads(json.dumps(to_json(blending)))) == blending
    old = {key: value for key, value in to_json(tiny).items() if key != "blend"}
    assert from_json(old) == tiny


def test_a_large_vocabulary_is_refused(blending):
    with pytest.raises(ConfigError, match="text_orders=0"):
        replace(blending, model=replace(blending.model, vocab_size=60_000)).validate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("candidates", [None, CANDIDATES])
def test_the_gpu_says_what_the_cpu_says(blending, candidates):
    blending = replace(blending, blend=replace(SMALL, candidates=candidates))
    corpus, found = blending.data.open(), []
    for device in ("cpu", "cuda"):
        world = World(torch.device(device))
        learner = build_learner(blending, world)
        evaluator = make_evaluator(blending, learner.model, world, corpus, micro_tokens=128)
        made = blended.blend(blending, evaluator, corpus, 12, say=print)
        found.append(made.losses())
        pieces = list(made.evidence())
        found.append(torch.cat([piece.known_NE for piece in pieces]).cpu())
    assert torch.equal(found[1], found[3])
    assert found[0] == pytest.approx(found[2], abs=0.05)
