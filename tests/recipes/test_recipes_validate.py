"""Recipe.validate: every problem at once, each with the remedy, before anything starts."""

from dataclasses import replace

import pytest

from sabrage.config import ConfigError, override, resolve
from sabrage.recipes import RECIPES, find
from sabrage.run.device import DeviceFacts

CPU = DeviceFacts(kind="cpu", name="a CPU", memory=1)
TURING = DeviceFacts(kind="cuda", name="T4", memory=16 << 30, capability=(7, 5))
AMPERE = DeviceFacts(kind="cuda", name="RTX 3090", memory=24 << 30, capability=(8, 6))
HOPPER = DeviceFacts(kind="cuda", name="H100", memory=80 << 30, capability=(9, 0))


def changed(*assignments, name="nocap"):
    recipe = find(name)
    for assignment in assignments:
        recipe = override(recipe, assignment)
    return recipe


def problems(recipe, facts=None):
    with pytest.raises(ConfigError) as caught:
        recipe.validate(facts)
    first, *lines = str(caught.value).splitlines()
    assert first == f"recipe {recipe.name!r} cannot run:"
    return lines


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_listed_under_its_own_name(name):
    recipe = find(name)
    assert recipe.validate() is recipe
    assert recipe.name == name
    assert recipe.summary.strip() == recipe.summary != ""
    assert "\n" not in recipe.summary


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'nocap'"):
        find("nocaps")


def test_all_problems_are_named_at_once():
    lines = problems(
        changed(
            "budget.log_every=0",
            "budget.seed=-1",
            "runtime.micro_batch=-1",
            "runtime.memory_fraction=2",
            "plan.steps=0",
            "plan.lr.warmup=-1",
            "optim.0.optimizer.lr=-1",
            "model.mixers.0.heads=7",
            "model.feedforwards.0.expansion=0",
            "data.num_shards=-1",
        ),
    )
    for said in (
        "  - budget.log_every=0 must be at least 1",
        "  - budget.seed=-1 must be at least 0",
        "  - runtime.micro_batch=-1",
        "  - runtime.memory_fraction=2.0",
        "  - plan.steps=0",
        "  - plan.lr: Trapezoid(warmup=-1",
        "  - optim.0.optimizer: AdamW.lr=-1",
        "  - model.mixers.0: mixer.heads=7 does not cut dim=768",
        "  - model.feedforwards.0: expansion=0",
        "  - data.num_shards=-1",
    ):
        assert any(line.startswith(said) for line in lines), said
    assert len(lines) == 10


def test_the_precision_is_refused_beside_the_other_problems():
    lines = problems(changed("plan.steps=0"), TURING)
    assert len(lines) == 2
    assert any("bf16" in line and "T4" in line for line in lines)
    assert changed("precision=Fp32").validate(TURING)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["optim=[]"], "optim is empty"),
        (["model.layers=0"], "model.layers=0 must be at least 1"),
        (["model.dim=0"], "model.dim=0 must be at least 1"),
        (["model.mixers=[]"], "model.mixers has 0 items, allowed: 1 to layers"),
        (["model.layers=1", 'model.feedforwards=[{"part": "Mlp"}, {"part": "Mlp"}]'], "has 2 items"),
        (["model.mixers.0.heads=0"], "mixer.heads=0 does not cut dim=768 into heads of even width; use 1, 2"),
        (["model.mixers.0.heads=7"], "use 4, 6, 8"),
        (["model.dim=7", "model.mixers.0.heads=1"], "use an even dim"),
        (["model.mixers.0.rotary.max_length=0"], "max_length=0"),
        (["data.block_tokens=0"], "data.block_tokens=0"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(assignments, said):
    assert said in "\n".join(problems(changed(*assignments)))


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (
            ["plan.tokens_per_step=20480"],
            "plan.tokens_per_step=20480 is not whole blocks of data.block_tokens=16384; use 32768, or "
            "data.block_tokens=1024",
        ),
        (
            ["plan.sequence_length=32768", "model.mixers.0.rotary.max_length=32768"],
            "data.block_tokens=16384 is not whole rows of plan.sequence_length=32768; use "
            "data.block_tokens=32768",
        ),
        (
            [
                'plan.sequence_length={"part": "Stages", "values": [1024, 1536], "starts": [0, 9]}',
                "plan.tokens_per_step=49152",
            ],
            "at step 9: data.block_tokens=16384 is not whole rows of plan.sequence_length=1536; use "
            "data.block_tokens=16896",
        ),
        (["model.vocab_size=50000"], "use model.vocab_size=50257 or more"),
        (
            ["budget.evaluation_length=20000"],
            "budget.evaluation_length=20000 is more than model.mixers.0.rotary.max_length=16384; use "
            "model.mixers.0.rotary.max_length=20000 or more",
        ),
        (
            ["model.mixers.0.rotary.max_length=512"],
            "plan.sequence_length=1024 is more than model.mixers.0.rotary.max_length=512",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_with_a_remedy_that_works(assignments, said):
    assert said in "\n".join(problems(changed(*assignments)))


def test_the_remedies_work():
    changed("plan.tokens_per_step=32768").validate()
    changed("plan.tokens_per_step=20480", "data.block_tokens=1024").validate()
    changed("model.vocab_size=50304").validate()
    changed("model.mixers.0.rotary=null", "budget.evaluation_length=20000").validate()
    changed("model.mixers.0.heads=6").validate()


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_a_named_fused_backend_is_refused_where_it_cannot_run(backend):
    recipe = changed(f"model.mixers.0.backend={backend}")
    assert f"attention backend '{backend}' needs a CUDA device" in problems(recipe, CPU)[0]
    assert any("attention backend" in line for line in problems(recipe, TURING))
    assert recipe.validate(AMPERE)
    assert recipe.validate(HOPPER)
    assert recipe.validate(), "a recipe is stored as it was asked for, and loads anywhere"
    full = override(recipe, "precision=Fp32")
    assert "the products of this run are fp32" in problems(full, HOPPER)[0]


@pytest.mark.parametrize(
    ("facts", "precision", "chosen"),
    [
        (CPU, "Fp32", "sdpa"),
        (CPU, "Bf16", "sdpa"),
        (TURING, "Fp32", "sdpa"),
        (AMPERE, "Bf16", "flash"),
        (AMPERE, "Fp32", "sdpa"),
        (HOPPER, "Bf16", "cudnn"),
        (HOPPER, "Fp32", "sdpa"),
    ],
)
def test_auto_is_resolved_for_the_device_and_the_precision_to_what_is_not_refused(facts, precision, chosen):
    recipe = resolve(changed(f"precision={precision}"), facts)
    assert recipe.model.mixers[0].backend == chosen
    assert recipe.refusals(facts) == []
    assert recipe.runtime.compile == ("on" if facts.kind == "cuda" else "off")


def test_one_refusal_shared_by_several_layers_is_said_once():
    recipe = changed("model.mixers.0.backend=flash")
    twice = replace(recipe, model=replace(recipe.model, mixers=recipe.model.mixers * 2))
    assert len(problems(twice, CPU)) == 1
