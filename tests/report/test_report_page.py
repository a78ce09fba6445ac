import re

import pytest

from sabrage.report.page import recipe_rows, write_page
from sabrage.run.folder import RunFolder, write_json
from sabrage.run.log import Log

CLOCKS = {"train_seconds": 192.0, "nocap_seconds": 200.0, "wall_seconds": 7500.0}
MANIFEST = {
    "started": "2026-11-23T12:00:00+00:00",
    "command": ["sabrage", "train", "tiny"],
    "recipe": {
        "part": "Recipe", "name": "tiny <&>", "model": {"part": "ModelSpec", "dim": 64, "windows": [1, 2]},
        "optim": [{"part": "OptimizerGroup", "pattern": ".*"}], "budget": {"part": "Budget", "target": 3.5},
    },
    "seed": 7, "backends": {"attention": "sdpa"}, "data": {"track": "embedded", "sha256": "beef"},
    "device": {"name": "CPU", "memory": 8 << 30},
    "versions": {"torch": "2.13.0", "triton": None},
    "code": {"commit": "c0ffee", "dirty": True, "diff": "+a < b"},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run that goes on: a manifest and a log."""
    folder = RunFolder(tmp_path)
    write_json(folder.manifest, MANIFEST)
    with Log(folder.log) as log:
        for step in range(20):
            log.write("train", step=step, loss=10.0 / (step + 1))
        log.write("validation", step=20, loss=3.4567, **CLOCKS)
        log.write("train", step=20, loss=float("nan"))
    return folder


def page(folder):
    return write_page(folder.path).read_text()


def test_the_page_shows_the_loss_the_three_clocks_the_recipe_and_the_environment(run):
    write_json(run.result, {"validation_loss": 3.4321, "ending": "target", "mfu": 0.4, **CLOCKS})
    html = page(run)
    for text in ("3.4321", "target", "3 min 12 s", "3 min 20 s", "2 h 05 min", "40.0%", "ModelSpec",
                 "windows", "1, 2", "torch 2.13.0", "c0ffee with uncommitted changes",
                 "sabrage train tiny", "beef",
                 "2026-11-23 12:00:00 UTC", "sdpa"):  # fmt: skip
        assert text in html


def test_a_run_that_goes_on_shows_its_last_validation(run):
    html = page(run)
    assert "3.4567" in html
    assert "not ended" in html


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    write_json(RunFolder(tmp_path).manifest, MANIFEST | {"code": None})
    assert "Nothing has been logged yet" in page(RunFolder(tmp_path))


def test_the_curve_is_there_with_linear_and_with_logarithmic_steps(run):
    html = page(run)
    assert html.count('<svg class="chart"') == 2
    assert html.count('class="target"') == 2
    assert 'type="checkbox" id="log"' in html


def test_the_page_is_one_file_that_asks_for_nothing(run):
    html = page(run)
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|https?:", html)
    assert "prefers-color-scheme: dark" in html


def test_text_of_the_run_is_escaped(run):
    write_json(run.result, {"sample": "<script>alert(1)</script>"})
    html = page(run)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "tiny &lt;&amp;&gt;" in html
    assert "+a &lt; b" in html


def test_without_a_sample_there_is_no_place_for_one(run):
    assert "A sample" not in page(run)


def test_a_recipe_is_a_table_of_parts_and_values():
    rows = list(
        recipe_rows({"part": "R", "a": 1, "b": {"part": "B", "c": None}, "d": [1, 2], "e": [{"part": "E"}]})
    )
    assert rows == [
        (0, "recipe", "R"), (1, "a", "1"), (1, "b", "B"), (2, "c", "none"), (1, "d", "1, 2"), (1, "e", ""),
        (2, "0", "E"),
    ]  # fmt: skip
