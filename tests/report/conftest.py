"""Run folders as training leaves them, made in milliseconds, and studies and results beside them."""

import copy
import json

import pytest

from sabrage.run.folder import RunFolder, write_json
from sabrage.run.log import Log

RECIPE = {
    "part": "Recipe", "name": "tiny", "summary": "a tiny one",
    "model": {"part": "ModelSpec", "layers": 2, "dim": 64,
              "mixers": [{"part": "MultiHead", "heads": 4, "qk_norm": True}]},
    "plan": {"part": "Plan", "steps": 40, "tokens_per_step": 512},
    "budget": {"part": "Budget", "seed": 0, "target": None},
}  # fmt: skip


def changed(recipe, changes):
    """The recipe with {"model.layers": 4} changed."""
    recipe = copy.deepcopy(recipe)
    for path, value in changes.items():
        *keys, last = path.split(".")
        part = recipe
        for key in keys:
            part = part[int(key)] if isinstance(part, list) else part[key]
        part[last] = value
    return recipe


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, ...) -> the path of a run of 40 steps of a second and 512 tokens each."""

    def make(
        name, *, changes=None, seed=0, steps=40, done=True, loss=3.5, second=1.0, result=None, **manifest
    ):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(parents=True)
        recipe = changed(RECIPE, (changes or {}) | {"budget.seed": seed})
        facts = {
            "started": "2026-11-23T12:00:00+00:00", "command": ["sabrage", "train", "tiny"], "recipe": recipe,
            "seed": seed, "backends": {"attention": "sdpa"}, "data": {"sha256": "beef"}, "track": "embedded",
            "device": {"name": "pocket calculator", "memory": 8 << 30}, "parameters": 1000, "processes": 1,
            "versions": {"torch": "2.13.0", "triton": None}, "legality": None,
            "code": {"commit": "c0ffee", "dirty": True, "diff": "+a < b"},
        }  # fmt: skip
        write_json(folder.manifest, facts | manifest)
        last = {}
        with Log(folder.log) as log:
            for step in range(1, steps + 1):
                log.write("train", step=step - 1, loss=loss + 8 / step, lr=1 - step / 80)
                if step % 10 == 0:
                    status = {"tokens": 512 * step, "train_seconds": second * step}
                    speed = {"tokens_per_second": 512 / second, "mfu": 0.4, "memory": 3 << 30}
                    log.write("speed", step=step, **status, **speed)
                    clocks = {
                        "train_seconds": second * step, "nocap_seconds": 5 + second * step,
                        "wall_seconds": 9 + second * step,
                    }  # fmt: skip
                    last = {"validation_loss": loss + (40 - step) / 40, "tokens": 512 * step, **clocks}
                    log.write(
                        "validation", step=step, loss=last["validation_loss"], tokens=512 * step, **clocks
                    )
        if done:
            facts = {
                "ending": "done", "steps": steps, "tokens_per_second": 512 / second, "mfu": 0.4,
                "median_step_seconds": second, "peak_memory": 3 << 30, "warmup_seconds": 2.0,
                "validation_seconds": 1.0,
            }  # fmt: skip
            write_json(folder.result, last | facts | (result or {}))
        return folder.path

    return make


KERNELS = {
    "name": "kernels", "track": None, "device": "a GPU", "versions": {"torch": "2.13"}, "commit": "c0ffee",
    "date": "2026-11-24", "recipe": None, "seeds": None, "clocks": None,
    "columns": [
        {"key": "operation", "title": "operation"},
        {"key": "heads", "title": "heads"},
        {"key": "kernel_20", "title": "20%", "format": ".3f"},
        {"key": "kernel_ms", "title": "kernel ms", "format": ".3f"},
        {"key": "eager_ms", "title": "eager ms", "format": ".3f"},
        {"key": "copy_gbs", "title": "GB/s", "format": ".0f"},
    ],
    "rows": [
        {"operation": "norm", "heads": 16, "kernel_20": 0.9, "kernel_ms": 1.0, "eager_ms": 4.0,
         "copy_gbs": 50},
        {"operation": "head", "heads": 32, "kernel_20": 1.9, "kernel_ms": 2.0, "copy_gbs": 100},
        {"operation": "broken", "heads": 64},
    ],
}  # fmt: skip

STUDY = {
    "name": "mine", "track": "embedded", "device": "pocket calculator", "versions": {"torch": "2.13"},
    "commit": "c0ffee", "date": "2026-11-24", "recipe": "tiny", "seeds": [0, 1], "clocks": None,
    "columns": [{"key": "variant", "title": "variant"}, {"key": "loss", "title": "loss", "format": ".4f"}],
    "rows": [
        {"variant": "tiny", "loss": 3.5},
        {"variant": "deep", "loss": 3.4, "loss_difference": -0.1, "loss_half": 0.05},
        {"variant": "wide", "loss": 3.52, "loss_difference": 0.02, "loss_half": 0.08},
        {"variant": "once", "loss": 3.6, "loss_difference": 0.1, "loss_half": None},
    ],
    "kind": "compare", "target": 3.5, "sentences": ["deep: better"], "notes": ["two seeds are few"],
    "failures": {"broken, seed 0": "runs/broken.txt"}, "skipped": {"odd": "it cannot run"},
}  # fmt: skip


@pytest.fixture
def kernels(tmp_path):
    """A result file of kernel timings."""
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(KERNELS))
    return path


@pytest.fixture
def study(make_run, tmp_path):
    """The folder of a study of two variants and two seeds, with its summary."""
    for seed in (0, 1):
        started = f"2026-11-23T1{seed}:00:0{{}}+00:00"
        make_run(f"study/runs/tiny--seed-{seed}", seed=seed, started=started.format(0))
        deep = {"model.layers": 4}
        make_run(f"study/runs/deep--seed-{seed}", seed=seed, changes=deep, started=started.format(1))
    folder = tmp_path / "study"
    write_json(folder / "study.json", {"part": "StudyPlan"})
    write_json(folder / "summary.json", STUDY)
    return folder
