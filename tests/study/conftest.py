"""A stand-in for `sabrage train`: writes a run folder in milliseconds, its loss a function of the recipe."""

import sys

import pytest

from sabrage.recipes import RECIPES

PROGRAM = """
import argparse, json, random, signal, sys
from pathlib import Path

words = argparse.ArgumentParser()
words.add_argument("command")
words.add_argument("recipe")
words.add_argument("--out", type=Path)
words.add_argument("--set", action="append", default=[])
words.add_argument("--seed", type=int)
words.add_argument("--resume", action="store_true")
given = words.parse_args()
values = dict(assignment.split("=", 1) for assignment in given.set)
with open("calls.txt", "a") as calls:
    calls.write(f"{given.out.name}{' resumed' if given.resume else ''}\\n")

if not given.resume:
    given.out.mkdir(parents=True)
    manifest = {
        "started": "2026-11-24T10:00:00+00:00", "track": "embedded", "device": {"name": "pocket calculator"},
        "versions": {"torch": "0"}, "code": {"commit": "c0ffee", "diff": ""}, "seed": given.seed,
        "recipe": {"part": "Recipe", "name": given.recipe}, "values": values,
    }
    (given.out / "manifest.json").write_text(json.dumps(manifest))
manifest = json.loads((given.out / "manifest.json").read_text())
values, seed = manifest["values"], manifest["seed"]
if values.get("model.layers") == "3":
    print("out of memory")
    sys.exit(3)
if values.get("model.layers") == "5":
    print("the disk went away")
    sys.exit(4)
if values.get("budget.checkpoint_every") == "7" and not given.resume:
    # Waits to be interrupted, as a long run would be.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (given.out / "checkpoints" / "step-00000001").mkdir(parents=True)
    signal.pause()

layers, steps = int(values.get("model.layers", 4)), int(values.get("plan.steps", DEMO_STEPS))
noise = random.Random(seed).gauss(0, 0.004) + random.Random(f"{seed} {layers}").gauss(0, 0.001)
step_seconds = layers / 100
with open(given.out / "log.jsonl", "w") as log:
    for tenth in range(1, 11):
        step = max(1, steps * tenth // 10)
        common = {"step": step, "tokens": step * 4096, "train_seconds": step * step_seconds}
        loss = 3 + 40 / (step * (1 + layers / 40)) + noise
        log.write(json.dumps({"event": "speed", **common, "tokens_per_second": 4096 / step_seconds}) + "\\n")
        log.write(json.dumps({"event": "validation", **common, "loss": loss}) + "\\n")
seconds = steps * step_seconds
result = {
    "ending": "until" if "budget.until" in values else "done",
    "validation_loss": loss, "steps": steps, "tokens": steps * 4096,
    "tokens_per_second": 4096 / step_seconds, "train_seconds": seconds, "nocap_seconds": seconds + 1,
    "wall_seconds": seconds + 2, "median_step_seconds": step_seconds, "peak_memory": None,
}
length = int(values.get("plan.sequence_length", 256))
if values.get("budget.by_position") == "true":
    result["by_position"] = [[0, 64, loss + 0.1], [64, length, loss - 0.1]][: 1 + (length > 64)]

(given.out / "checkpoints" / "step-last").mkdir(parents=True)
(given.out / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The words that start the stand-in; the working folder is `tmp_path`, `calls.txt` in it the log."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(PROGRAM.replace("DEMO_STEPS", str(RECIPES["demo"].plan.steps)))
    return (sys.executable, str(tmp_path / "train.py"))


@pytest.fixture
def calls(tmp_path):
    """The runs that were started so far, in order."""
    return lambda: (tmp_path / "calls.txt").read_text().splitlines()
