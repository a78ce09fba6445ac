"""The baseline measured: `nocap-mini` to its end from a cold start, then a short warm start.

    python -m sabrage.bench.nocap_mini --data DIR --out DIR

DIR holds the shards of the stand-in track (143.5M training tokens). Writes OUT/nocap-mini.json (three
clocks, speed, memory, cold and warm start) and OUT/nocap-mini-curve.json (the validation curve), and prints
them. The compile cache of the cold start is an empty folder; the warm start uses what it left there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sabrage.bench.result import Column, write_result
from sabrage.run.folder import Run, read_run

WARM_STEPS = 24
COLUMNS: list[Column] = [
    {"key": "start", "title": "start"},
    {"key": "steps", "title": "steps"},
    {"key": "tokens", "title": "tokens", "format": ",d"},
    {"key": "validation_loss", "title": "validation loss", "format": ".4f"},
    {"key": "train_seconds", "title": "train s", "format": ".1f"},
    {"key": "nocap_seconds", "title": "nocap s", "format": ".1f"},
    {"key": "wall_seconds", "title": "wall s", "format": ".1f"},
    {"key": "startup_seconds", "title": "wall - train s", "format": ".1f"},
    {"key": "warmup_seconds", "title": "of it warm-up s", "format": ".1f"},
    {"key": "validation_seconds", "title": "validation s", "format": ".1f"},
    {"key": "median_step_seconds", "title": "step s (median)", "format": ".4f"},
    {"key": "tokens_per_second", "title": "tokens/s", "format": ",.0f"},
    {"key": "mfu", "title": "MFU", "format": ".1%"},
    {"key": "peak_gib", "title": "peak GiB", "format": ".1f"},
]
CURVE: list[Column] = [
    {"key": "step", "title": "steps"},
    {"key": "tokens", "title": "tokens", "format": ",d"},
    {"key": "train_seconds", "title": "train s", "format": ".1f"},
    {"key": "loss", "title": "validation loss", "format": ".4f"},
]


def train(data: Path, folder: Path, cache: Path, *options: str) -> Run:
    """One `sabrage train nocap-mini` in a process of its own; its checkpoints are deleted afterwards."""
    command = [sys.executable, "-m", "sabrage", "train", "nocap-mini", "--out", str(folder)]
    command += ["--set", f"data.path={data}", "--set", "data.track=stand-in", *options]
    subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return read_run(folder)


def row(start: str, run: Run) -> dict[str, Any]:
    """The result of one run as a row of the table."""
    assert run.result is not None, f"{run.path} has no result"
    wanted = {column["key"] for column in COLUMNS}
    found = {key: value for key, value in run.result.items() if key in wanted}
    peak = run.result["peak_memory"]
    return found | {
        "start": start,
        "startup_seconds": run.result["wall_seconds"] - run.result["train_seconds"],
        "peak_gib": peak / 2**30 if peak else None,
    }


def measure(data: Path, out: Path, *, options: list[str], commit: str | None) -> None:
    """Both runs, and their result files."""
    cache = out / "compile-cache"
    shutil.rmtree(cache, ignore_errors=True)
    cold = train(data, out / "cold", cache, *options)
    warm = train(data, out / "warm", cache, *options, "--steps", str(WARM_STEPS))
    shutil.rmtree(cache, ignore_errors=True)
    rows = [row("cold", cold), row("warm", warm)]
    common: dict[str, Any] = {
        "device": cold.manifest["device"]["name"],
        "track": cold.manifest["track"],
        "recipe": "nocap-mini",
        "seeds": [cold.manifest["seed"]],
        "clocks": {name: rows[0][name] for name in ("train_seconds", "nocap_seconds", "wall_seconds")},
        "commit": commit,
    }
    write_result(out / "nocap-mini.json", name="nocap-mini", columns=COLUMNS, rows=rows, **common)
    curve = cold.events("validation")
    write_result(out / "nocap-mini-curve.json", name="nocap-mini-curve", columns=CURVE, rows=curve, **common)
    print(json.dumps(rows, indent=1))
    print(json.dumps([{key: point[key] for key in ("step", "loss", "train_seconds")} for point in curve]))


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the stand-in track's shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and result files")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    parser.add_argument("options", nargs="*", help="further options of `sabrage train`, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measure(args.data, args.out, options=args.options, commit=args.commit)


if __name__ == "__main__":
    main()
