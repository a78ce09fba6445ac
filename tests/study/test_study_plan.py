import json
from dataclasses import replace

import pytest

from sabrage.config import ConfigError, from_json, to_json
from sabrage.plan import Constant, Plan, Stages, Trapezoid
from sabrage.recipes import find
from sabrage.study.plan import (
    StudyError,
    StudyPlan,
    Variant,
    ablation,
    fitted,
    parse_variant,
    same,
    sweep,
)


def test_a_scaled_plan_keeps_its_shape():
    stages = Stages(values=(8, 16, 32), starts=(0, 50, 150))
    plan = Plan(
        steps=200, lr=Trapezoid(warmup=20, warmdown=100), tokens_per_step=stages, sequence_length=8,
        weight_decay=Constant(value=0.5),
    )  # fmt: skip
    half = plan.scaled(100)
    assert half.lr == Trapezoid(warmup=10, warmdown=50)
    assert half.tokens_per_step == Stages(values=(8, 16, 32), starts=(0, 25, 75))
    assert half.tokens() * 2 == plan.tokens()
    assert half.scaled(200) == plan


def test_a_plan_can_be_scaled_to_a_single_step():
    stages = Stages(values=(8, 16), starts=(0, 50))
    plan = Plan(steps=200, lr=Trapezoid(warmup=20, warmdown=0), tokens_per_step=stages, sequence_length=8)
    assert plan.scaled(1).lr == Trapezoid(warmup=1, warmdown=0)
    assert plan.scaled(1).tokens_per_step == Stages(values=(16,), starts=(0,))
    assert plan.scaled(1).problems() == []


def test_a_variant_is_written_as_a_recipe_and_its_changes():
    variant = parse_variant("demo+model.layers=2+plan.lr.floor=1e+0", ["model.dim=48"])
    assert variant.recipe == "demo"
    assert variant.sets == ("model.dim=48", "model.layers=2", "plan.lr.floor=1e+0")
    assert variant.make().model.layers == 2


def test_a_variant_that_cannot_run_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"no field 'layer' .did you mean 'layers'"):
        parse_variant("demo+model.layer=2")
    with pytest.raises(ConfigError, match=r"model\.layers=0"):
        parse_variant("demo+model.layers=0")


def test_a_plan_comes_back_from_json():
    plan = StudyPlan(kind="compare", variants=(parse_variant("demo+model.layers=2"),), seeds=(0, 1), steps=5)
    assert from_json(to_json(plan), StudyPlan) == plan


def test_fitting_to_steps_keeps_the_share_of_every_schedule():
    demo = find("demo")
    short = fitted(demo, steps=demo.plan.steps // 5)
    assert short.plan.lr.warmdown == round(demo.plan.lr.warmdown / 5)
    assert short.budget.evaluate_every == round(demo.budget.evaluate_every / 5)


def test_fitting_to_tokens_counts_tokens():
    assert fitted(find("demo"), tokens=4096 * 100).plan.tokens() == 4096 * 100
    assert fitted(find("demo"), tokens=find("demo").plan.tokens()) == find("demo")


def test_becoming_another_recipe_takes_only_the_words_of_train():
    variant, wanted = parse_variant("nocap"), find("base")
    became = variant.become(wanted)
    assert became.make() == wanted
    assert all(isinstance(word, str) for word in became.sets)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "tokens": 5}, "give one of steps, tokens and minutes"),
        ({"minutes": 0.0}, "above 0"),
        ({"seeds": ()}, "at least one variant and one seed"),
        ({"variants": (Variant(name="a", recipe="demo"),) * 2}, "same name"),
    ],
)
def test_a_plan_that_cannot_be_run_says_why(fields, message):
    plan = StudyPlan(kind="compare", variants=(Variant(name="demo", recipe="demo"),), seeds=(0,))
    with pytest.raises(StudyError, match=message):
        replace(plan, **fields).check()


def test_losses_over_different_validation_tokens_are_not_compared():
    variants = (parse_variant("demo"), parse_variant("demo+budget.evaluation_tokens=2048"))
    with pytest.raises(StudyError, match="do not compare"):
        StudyPlan(kind="compare", variants=variants, seeds=(0,)).check()


def test_a_sweep_is_every_combination_in_order():
    variants = sweep("demo", ["model.layers=2,4", "model.dim=48,96"])
    assert [variant.sets for variant in variants] == [
        ("model.layers=2", "model.dim=48"),
        ("model.layers=2", "model.dim=96"),
        ("model.layers=4", "model.dim=48"),
        ("model.layers=4", "model.dim=96"),
    ]


@pytest.mark.parametrize("axis", ["model.layers", "model.layers=", "model.layers=1,,2"])
def test_an_axis_without_values_is_refused(axis):
    with pytest.raises(StudyError, match="allowed: FIELD"):
        sweep("demo", [axis])


def test_an_ablation_takes_out_and_adds_every_part_that_differs():
    variants, skipped = ablation("base", "nocap")
    parts = ["model.mixers.0", "model.feedforwards.0", "optim", "plan.lr", "plan"]
    expected = ["base", *(f"without {part}" for part in parts), *(f"only {part}" for part in parts), "nocap"]
    assert [variant.name for variant in variants] == expected
    assert skipped == {}
    made = {variant.name: variant.make() for variant in variants}
    base, nocap = find("base"), find("nocap")
    assert same(made["base"], base)
    assert made["without optim"].optim == nocap.optim
    assert made["without optim"].model == base.model
    assert made["only optim"].optim == base.optim
    assert made["only optim"].model == nocap.model


def test_an_ablation_trains_every_variant_on_equally_many_tokens_by_the_same_measure():
    made = [variant.make() for variant in ablation("base", "nocap")[0]]
    assert len({recipe.plan.tokens() for recipe in made}) == 1
    assert len({recipe.budget.evaluation_tokens for recipe in made}) == 1
    shares = {round(recipe.plan.lr.warmdown / recipe.plan.steps, 2) for recipe in made}
    assert shares <= {0.5, 0.21}


def test_an_ablation_leaves_out_what_cannot_run_and_says_why():
    grown = "demo+model.layers=2+plan.sequence_length=128+data.block_tokens=128"
    variants, skipped = ablation(grown, "demo")
    assert "without model" in [variant.name for variant in variants]
    assert "block_tokens" in skipped["without plan"] or "block_tokens" in skipped["only data"]


def test_an_ablation_of_one_part_is_a_comparison():
    with pytest.raises(StudyError, match="differs from 'base' in 1 parts"):
        ablation("base-adamw", "base")


def test_an_ablation_leaves_alone_what_is_to_be_kept():
    names = [variant.name for variant in ablation("base", "nocap", keep=("plan", "optim"))[0]]
    parts = ["model.mixers.0", "model.feedforwards.0", "plan.lr"]
    assert names == ["base", *(f"{what} {part}" for what in ("without", "only") for part in parts), "nocap"]
    tricks = [variant.name for variant in ablation(GROWN, "base", alone=True, keep=("Muon.normuon",))[0]]
    assert "without BigramHash" in tricks
    assert "without Muon.normuon" not in tricks
    with pytest.raises(StudyError, match=r"got paln to keep, allowed: .*plan\.lr"):
        ablation("base", "nocap", keep=("paln",))


def test_a_trick_that_is_a_number_is_turned_off_by_hand():
    change = "plan.lr.warmdown=1+plan.lr.warmup=2"
    variants, _ = ablation("base", "nocap", ("model.layers=6",), also=(change,))
    assert variants[1].name == f"with base+{change}"
    made = variants[1].make()
    assert (made.plan.lr.warmdown, made.plan.lr.warmup, made.model.layers) == (1, 2, 6)
    with pytest.raises(ConfigError, match="warmdwn"):
        ablation("base", "nocap", also=("plan.lr.warmdwn=1",))


GROWN = (
    "base+model.embedding=BigramHash+model.embedding.inner.normalise=true+model.wiring=Skipping"
    '+model.wiring.skips=[{"part": "SkipScales"}, {"part": "LayerSkips"}]+model.mixers.0.window_share=0.5'
    "+optim.0.optimizer.normuon=true+optim.0.optimizer.lr=0.02+model.head.softcap=15"
)


def test_an_ablation_leaves_out_each_trick_alone():
    variants, skipped = ablation(GROWN, "base", alone=True)
    made = {variant.name: variant.make() for variant in variants}
    assert not [name for name in made if name.startswith("only")]
    whole = made[GROWN]
    spec = whole.model
    assert made["without BigramHash"].model == replace(spec, embedding=spec.embedding.inner)
    plain = replace(spec.embedding, inner=replace(spec.embedding.inner, normalise=False))
    assert made["without TokenTable.normalise"].model == replace(spec, embedding=plain)
    skips = made["without SkipScales"].model.wiring.skips
    assert [type(skip).__name__ for skip in skips] == ["LayerSkips"]
    assert "without LayerSkips" in made
    # Rates are no tricks, and what the base has is none of this recipe's.
    muon = replace(whole.optim[0].optimizer, normuon=False)
    only_trick = made["without optim.0.optimizer"].optim[0].optimizer
    assert muon.lr == 0.02 != only_trick.lr
    assert made["without Muon.normuon"].optim[0].optimizer == muon
    assert not [name for name in [*made, *skipped] if "qk_norm" in name]
    # One part that has one trick alone is left out once.
    assert skipped["without MultiHead.window_share"] == "the same as 'without model.mixers.0'"


def test_a_blend_and_a_last_mixer_are_left_out_alone():
    text = "base+blend=Blend+model.last=Copying+model.last.head_width=64"
    made = {variant.name: variant.make() for variant in ablation(text, "base", alone=True)[0]}
    assert made["without blend"].blend is None
    assert made["without blend"].model.last is not None
    assert made["without model.last"].model.last is None
    assert made["without model.last"].blend is not None


def test_a_trick_of_many_layers_is_left_out_of_all():
    mixers = [{"part": "MultiHead", "heads": 12, "window": window} for window in (64, 128)]
    grown = f"base+model.mixers={json.dumps(mixers)}+model.head.softcap=15"
    variants, _ = ablation(grown, "base", alone=True)
    made = {variant.name: variant.make() for variant in variants}
    assert [mixer.window for mixer in made["without MultiHead.window"].model.mixers] == [None, None]


def test_an_optimizer_group_goes_with_its_parameters():
    variants, skipped = ablation("value-embeddings+model.head.softcap=15", "base")
    made = {variant.name: variant.make() for variant in variants}
    assert len(made["without model.wiring"].optim) == len(find("base").optim)
    assert same(
        made["without model.wiring"],
        replace(
            find("base"),
            model=replace(find("base").model, head=replace(find("base").model.head, softcap=15.0)),
        ),
    )
    assert not [name for name, reason in skipped.items() if "matches no parameter" in reason]
