import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from contracts import shrink

from sabrage.attention import backends, latent, multi_head
from sabrage.bench import breakdown, launches, regions
from sabrage.bench.breakdown_chart import chart, segments
from sabrage.bench.trial import ready
from sabrage.context import Context
from sabrage.plan import Stages
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts, probe

CPU = torch.device("cpu")
FACTS = DeviceFacts(kind="cpu", name="a CPU", memory=1 << 34, peaks={"fp32": 1e12})
MEASURED = (
    "step_ms",
    "head_ms",
    "feedforward_ms",
    "mixer_ms",
    "attention_ms",
    "embedding_ms",
    "optimizer_ms",
)


def listened(recipe):
    """(trial, pieces, micro-batches) of a recipe at the last stage of its plan."""
    trial = ready(recipe, FACTS, CPU, recipe.plan.stages())
    return trial, *regions.listen(trial, recipe.plan.stages()[-1])


def test_every_part_takes_time_and_the_parts_are_the_step(tiny, one_thread):
    found = breakdown.row(tiny, FACTS, CPU)
    assert all(found[name] > 0 for name in MEASURED)
    assert sum(found[name] for name in breakdown.PARTS) == pytest.approx(found["step_ms"])
    assert found["attention_ms"] < found["mixer_ms"]
    assert found["mfu"] == pytest.approx(found["floor_ms"] / found["step_ms"])
    assert found["of_ceiling"] is None
    # Nobody profiles a CPU.
    assert found["launches"] is found["idle"] is None


def test_the_ceiling_is_the_fastest_product_and_a_step_is_held_against_it(tiny, one_thread, monkeypatch):
    # 10 ms for the small product and 1 ms for the large one.
    took = iter([[10.0, 10.0, 90.0], [1.0, 1.0, 1.0]])
    monkeypatch.setattr(breakdown, "times", lambda work, device: work() is None or next(took))
    highest = breakdown.ceiling(CPU, tokens=8, shapes=((16, 32), (32, 64)))
    assert highest == pytest.approx(2 * 8 * 32 * 64 / 1e-3)
    found = breakdown.row(tiny, FACTS, CPU, highest=2e12)
    # Twice the rate of the peak that FACTS tells.
    assert found["of_ceiling"] == pytest.approx(found["mfu"] / 2)


def test_parts_are_counted_by_layers_and_micro_batches(tiny, one_thread, monkeypatch):
    monkeypatch.setattr(regions, "milliseconds", lambda piece, trial, *, flush: 1.0)
    plan = replace(tiny.plan, tokens_per_step=512)
    model = replace(
        tiny.model, layers=4, mixers=(*tiny.model.mixers, replace(tiny.model.mixers[0], window=8))
    )
    recipe = replace(tiny, plan=plan, model=model, runtime=replace(tiny.runtime, micro_batch=4))
    trial, pieces, micro_batches = listened(recipe)
    assert micro_batches == 4
    assert [(piece.kind, piece.count) for piece in pieces if piece.kind == "mixer"] == [("mixer", 2)] * 2
    found = regions.spent(trial, pieces, micro_batches)
    assert found == {"embedding": 4, "mixer": 16, "attention": 16, "feedforward": 16, "head": 4}


def test_a_piece_computes_what_the_model_computes_there(tiny, one_thread):
    trial, pieces, _ = listened(tiny)
    by_kind = {piece.kind: piece for piece in pieces}
    mixer = by_kind["mixer"]
    (attention,) = mixer.inner
    inside = attention.function(attention.tensors, attention.context)[0]
    output, *losses = mixer.function(mixer.tensors, mixer.context)
    assert losses == []
    assert torch.equal(mixer.module.out(inside.flatten(2)), output)
    tokens_BT = by_kind["embedding"].tensors[0]
    head = by_kind["head"]
    assert torch.equal(trial.learner.model(tokens_BT), head.tensors[0])
    (loss,) = head.function(head.tensors, head.context)
    total, _ = trial.learner(tokens_BT, head.context["targets_BT"], None, None)
    assert torch.equal(loss, total)


def test_a_piece_learns_inputs_and_weights(tiny, one_thread):
    _, pieces, _ = listened(tiny)
    mixer = next(piece for piece in pieces if piece.kind == "mixer")
    assert [tuple(each.shape) for each in mixer.learning()] == [(4, 32, 32), (96, 32), (32, 32)]
    assert [tuple(each.shape) for each in mixer.inner[0].learning()] == [(4, 32, 2, 16)] * 3


def test_documents_and_the_window_of_the_stage_reach_the_pieces(tiny, one_thread):
    plan = replace(tiny.plan, window=Stages(values=(64, 128), starts=(0, 6)))
    mixer = replace(tiny.model.mixers[0], window_share=1.0)
    recipe = replace(tiny, plan=plan, model=replace(tiny.model, mixers=(mixer,)))
    recipe = replace(recipe, data=replace(tiny.data, order="masked"))
    _, pieces, _ = listened(recipe)
    context = next(piece for piece in pieces if piece.kind == "mixer").context
    assert context["window"] == 128
    assert context["documents_BT"].unique().numel() == 4
    assert breakdown.stage_of(recipe, None).window == 128
    assert breakdown.stage_of(recipe, 0).window == 64


def test_listening_leaves_no_trace(tiny, one_thread):
    trial, _, _ = listened(tiny)
    assert multi_head.attend is latent.attend is backends.attend
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trial.learner.modules())


@pytest.mark.parametrize(
    "name", ["base", "mla", "pool-latent", "moe-2", "mtp-sequential", "value-embeddings"]
)
def test_each_piece_is_one_graph(name, counting, one_thread, monkeypatch):
    monkeypatch.setattr(regions, "compiled", lambda function, wanted: counting.compile(function))
    trial, pieces, micro_batches = listened(shrink(find(name)))
    found = regions.spent(trial, pieces, micro_batches)
    assert counting.graphs == len(pieces) + sum(len(piece.inner) for piece in pieces)
    assert all(ms > 0 for ms in found.values())


def test_layers_that_are_given_other_things_are_other_pieces(one_thread):
    recipe = shrink(find("value-embeddings"))
    recipe = replace(recipe, model=replace(recipe.model, layers=4))
    _, pieces, _ = listened(recipe)
    mixers = [piece for piece in pieces if piece.kind == "mixer"]
    # The first and the last of four layers are given values.
    assert [(piece.count, piece.context["values_BTD"] is None) for piece in mixers] == [(2, False), (2, True)]
    assert len([each for each in mixers[0].learning() if each.shape[-1] == 64]) > len(
        [each for each in mixers[1].learning() if each.shape[-1] == 64]
    )


def test_a_mixer_after_the_last_layer_is_a_mixer(one_thread):
    trial, pieces, micro_batches = listened(shrink(find("copying")))
    mixers = [piece for piece in pieces if piece.kind == "mixer"]
    assert [(piece.count, piece.context["head_VD"] is None) for piece in mixers] == [(2, True), (1, False)]
    assert regions.spent(trial, pieces, micro_batches)["attention"] > 0


def test_a_layer_without_attention_has_no_mixer(one_thread):
    recipe = shrink(find("fewer-mixers"))
    recipe = replace(recipe, model=replace(recipe.model, layers=4))
    trial, pieces, micro_batches = listened(recipe)
    assert [piece.count for piece in pieces if piece.kind == "mixer"] == [3]
    assert regions.spent(trial, pieces, micro_batches)["attention"] > 0


def test_attention_that_goes_another_way_has_no_number(tiny, one_thread, monkeypatch):
    monkeypatch.setattr(multi_head, "attend", lambda q, k, v, context, **options: v)
    trial, pieces, micro_batches = listened(tiny)
    assert regions.spent(trial, pieces, micro_batches)["attention"] is None


def test_what_a_context_collects_is_not_given_to_a_piece():
    context = Context(tokens_BT=torch.ones(1, 2, dtype=torch.int64), values_BTD=torch.ones(1, 2, 3))
    context.add_loss("term", torch.ones(()))
    held = regions.given(context)
    names = {"positions_BT", "documents_BT", "window", "layers", "tokens_BT", "pairs_BT", "values_BTD"}
    names |= {"pair_BTD", "head_VD"}
    assert held.keys() == names
    assert held["values_BTD"].requires_grad
    assert not held["tokens_BT"].requires_grad


def test_the_union_of_intervals_counts_what_overlaps_once():
    assert launches.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert launches.covered([]) == 0


def test_launches_and_idle_time_are_those_of_a_step():
    events = [{"cat": "kernel", "ts": start, "dur": 500.0} for start in (0.0, 250.0, 2000.0, 5000.0)]
    events += [
        {"cat": "gpu_memcpy", "ts": 2250.0, "dur": 500.0},
        {"cat": "gpu_user_annotation", "ts": 0, "dur": 9e9},
    ]
    # 750 + 750 + 500 microseconds of two steps of 4 milliseconds.
    assert launches.told(events, 4.0, repeats=2) == {"launches": 2, "idle": 0.75}
    assert launches.told([{"ph": "M"}], 4.0) == {"launches": None, "idle": None}


def test_the_longest_kernels_are_those_that_take_most_in_a_step():
    named = [("short", 3000.0), ("long", 1000.0), ("long", 4000.0), ("least", 10.0), ("short", 1000.0)]
    events = [{"cat": "kernel", "name": name, "dur": dur} for name, dur in named]
    events.append({"cat": "gpu_memcpy", "name": "copy", "dur": 9e9})
    found = launches.longest(events, 2, repeats=2)
    assert found == [
        {"kernel": "long", "ms": 2.5, "launches": 1.0},
        {"kernel": "short", "ms": 2.0, "launches": 1.0},
    ]
    assert launches.longest([], 5) == []


def test_the_kernels_are_a_table_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(breakdown, "probe", lambda device: DeviceFacts(kind="cuda", name="a card", memory=0))
    monkeypatch.setattr(breakdown, "ceiling", lambda device: 1e15)
    monkeypatch.setattr(breakdown, "use_compile_cache", lambda on: None)
    kernel = {"kernel": "triton_red_fused_add", "ms": 2.5, "launches": 3.0}

    def measured(recipe, facts, device, *, kernels, **_):
        return ROW | {"recipe": recipe.name} | ({"kernels": [kernel] * kernels} if kernels else {})

    monkeypatch.setattr(breakdown, "row", measured)
    breakdown.measure(["base"], out=tmp_path / "plain.json")
    assert not (tmp_path / "plain-kernels.json").exists()
    breakdown.measure(["base", "nocap"], kernels=2, out=tmp_path / "taken.json")
    made = json.loads((tmp_path / "taken-kernels.json").read_text())
    assert made["name"] == "taken-kernels"
    assert [row["recipe"] for row in made["rows"]] == ["base", "base", "nocap", "nocap"]
    assert made["rows"][0] == {"recipe": "base"} | kernel
    assert "kernels" not in json.loads((tmp_path / "taken.json").read_text())["rows"][0]
    assert "triton_red_fused_add" in capsys.readouterr().out


def test_a_refused_recipe_is_a_row_that_says_so():
    facts = DeviceFacts(kind="cuda", name="an old card", memory=0, capability=(7, 5))
    assert breakdown.row(find("fp8"), facts, CPU).keys() == {"recipe", "note"}


ROW = dict.fromkeys(MEASURED, 10.0) | {
    "recipe": "a <b>", "step_ms": 60.0, "mixer_ms": 25.0, "rest_ms": -5.0, "floor_ms": 20.0,
}  # fmt: skip


def test_the_chart_is_sound_xml_with_a_segment_for_every_part():
    drawn = ElementTree.fromstring(chart([ROW, {"recipe": "x", "note": "failed"}], "a & b"))
    space = "{http://www.w3.org/2000/svg}"
    found = [rect for rect in drawn.findall(f"{space}rect") if rect.get("class") == "part"]
    widths = [float(rect.get("width")) for rect in found]
    assert len(widths) == len(segments(ROW))
    assert widths[0] > 0
    assert widths[-1] == 0
    assert sum(segments(ROW).values()) == pytest.approx(ROW["step_ms"])
    assert len(drawn.findall(f"{space}line")) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_taken_apart_on_a_card(tmp_path):
    device = torch.device("cuda", 0)
    recipe = replace(shrink(find("base")), precision=find("base").precision)
    found = breakdown.row(recipe, probe(device), device, kernels=3)
    assert all(found[name] > 0 for name in MEASURED)
    times = [kernel["ms"] for kernel in found["kernels"]]
    assert len(times) == 3
    assert found["step_ms"] > times[0] >= times[-1] > 0
    assert sum(found[name] for name in breakdown.PARTS) == pytest.approx(found["step_ms"])
    assert found["launches"] > 10
    assert -0.2 < found["idle"] < 1
    assert json.loads(json.dumps(found)) == found
