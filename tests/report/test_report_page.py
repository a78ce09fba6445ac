import json
import re

import pytest

from sabrage.report.page import write_page, write_report
from sabrage.report.sources import ReportError
from sabrage.run.folder import RunFolder, write_json
from sabrage.run.log import Log

CHECKS = [{"name": "causality", "passed": True, "detail": "nothing moves"}]
LEGAL = {"passed": True, "checks": CHECKS}
LEAKY = {"passed": False, "checks": [*CHECKS, {"name": "documents", "passed": False, "detail": "block 3"}]}


@pytest.fixture
def report(tmp_path):
    """report(*paths) -> the text of their page."""
    return lambda *paths: write_report(paths, out=tmp_path / "page.html").read_text()


def test_the_page_of_a_run_shows_the_loss_the_three_clocks_the_recipe_and_the_environment(make_run):
    run = make_run("a", loss=3.4321, second=4.8, result={"ending": "target", "wall_seconds": 7500.0})
    html = write_page(run).read_text()
    for text in ("3.4321", "target", "3 min 12 s", "3 min 17 s", "2 h 05 min", "40.0%", "ModelSpec",
                 "heads", "torch 2.13.0", "c0ffee with uncommitted changes", "sabrage train tiny", "beef",
                 "2026-11-23 12:00:00 UTC", "sdpa", "3 GiB"):  # fmt: skip
        assert text in html


def test_the_page_of_an_inline_run_shows_the_clock_that_it_has(make_run):
    html = write_page(
        make_run("a", second=4.8, result={"nocap_seconds": None, "wall_seconds": None})
    ).read_text()
    assert "3 min 12 s" in html
    assert "since the process started" not in html


def test_a_run_that_goes_on_shows_its_last_validation(make_run):
    html = write_page(make_run("a", steps=20, done=False)).read_text()
    assert "4.0000" in html
    assert "not ended" in html


def test_a_run_that_has_logged_nothing_has_a_page(make_run):
    run = make_run("a", steps=0, done=False, code=None)
    assert "Nothing has been logged yet" in write_page(run).read_text()


def test_a_loss_that_is_not_a_number_is_a_gap_in_the_charts_and_told_in_words(make_run):
    run = make_run("a", done=False)
    with Log(RunFolder(run).log) as log:
        log.write("train", step=40, loss=float("nan"), lr=0.1)
        log.write("validation", step=41, loss=float("nan"), tokens=2, train_seconds=41.0, nocap_seconds=1.0,
                  wall_seconds=1.0)  # fmt: skip
    html = write_page(run).read_text()
    charts = re.findall(r'data-chart="(.*?)"', html)
    assert "[2,null]" in "".join(charts)
    assert all("NaN" not in chart for chart in charts)
    assert "<b>nan</b>" in html


def test_every_chart_is_there(make_run, report):
    html = report(make_run("a"), make_run("b", seed=1))
    for title in ("Loss against tokens", "Loss against seconds", "Throughput", "Model FLOP utilisation",
                  "Memory", "Learning-rate schedule", "Where the wall time went"):  # fmt: skip
        assert title in html
    assert html.count('<svg class="chart"') == 6


def test_a_reading_that_only_some_runs_have_is_a_chart_of_its_own(make_run, report):
    run = make_run("a", done=False)
    with Log(RunFolder(run).log) as log:
        status = {"tokens": 1, "train_seconds": 41.0, "tokens_per_second": 1.0, "mfu": None, "memory": None}
        log.write("speed", step=41, **status, loss_scale=65536.0)
    html = report(run, make_run("b"))
    assert "loss scale against step" in html


def test_runs_of_other_tracks_and_devices_have_tables_and_charts_of_their_own(make_run, report):
    runs = [
        make_run("a"), make_run("b", track="nocap"), make_run("c", device={"name": "GPU", "memory": 1}),
        make_run("d", processes=2),
    ]  # fmt: skip
    headings = re.findall(r"<h2>(Track .*?)</h2>", report(*runs))
    assert headings == [
        "Track embedded on pocket calculator", "Track nocap on pocket calculator", "Track embedded on GPU",
        "Track embedded on 2 x pocket calculator",
    ]  # fmt: skip


def test_how_recipes_differ_is_told_field_by_field(make_run, report):
    html = report(make_run("a"), make_run("b", changes={"model.layers": 6}))
    assert re.search(r"<td>model\.layers</td><td class=\"old\">2</td><td>6</td>", html)


@pytest.mark.parametrize(
    ("legality", "badge"), [(None, "unchecked"), (LEGAL, "&check; legal"), (LEAKY, "&cross; not legal")]
)
def test_whether_a_model_was_shown_to_be_legal_is_a_badge(make_run, report, legality, badge):
    html = report(make_run("a", legality=legality), make_run("b", legality=legality))
    assert html.count(badge) == 2
    assert ("block 3" in html) == (legality is LEAKY)


def test_a_study_shows_its_sentences_intervals_table_notes_and_runs(study, report):
    html = report(study)
    for text in ("deep: better", "two seeds are few", "-0.1000 ± 0.0500", "3.5200", "runs/broken.txt",
                 "odd: it cannot run", "deep--seed-1"):  # fmt: skip
        assert text in html
    assert re.findall(r'<div class="span (\w+)">', html) == ["better", "open", "open"]


def test_the_recipes_of_a_study_have_its_names_and_its_reference_comes_first(study, report):
    html = report(study)
    assert "How the recipes differ from tiny" in html
    assert [re.sub("<.*?>", "", label) for label in re.findall(r'data-runs=.*?>(.*?)</button>', html)] == [
        "tiny &times; 2", "deep &times; 2"
    ]  # fmt: skip


def test_a_study_that_goes_on_has_a_page(study, report):
    (study / "summary.json").unlink()
    assert "It has not ended" in report(study)


def test_a_race_shows_its_verdict_and_what_it_explored(study, report):
    path = study / "summary.json"
    write_json(path, json.loads(path.read_text()) | {"confirmed": False, "explored": {"80": 3.6, "100": 3.4}})
    html = report(study)
    assert "not confirmed" in html
    assert "What the race explored" in html


def test_a_result_file_is_a_table_and_a_chart_for_every_unit(kernels, report):
    html = report(kernels)
    assert "kernels: milliseconds, each row to its own scale" in html
    assert "kernels: copy, GB/s" in html
    assert "<th>operation</th>" in html


def test_a_folder_of_runs_stands_for_its_runs(make_run, report, tmp_path):
    make_run("runs/a")
    make_run("runs/b", seed=1)
    assert "2 runs" in report(tmp_path / "runs")


def test_a_path_that_is_no_source_names_the_remedy(tmp_path, report):
    with pytest.raises(ReportError, match="give the folder of a run or of a study"):
        report(tmp_path)
    with pytest.raises(ReportError, match="allowed: one or more"):
        report()


def test_the_page_is_one_file_that_asks_for_nothing(study, kernels, report):
    html = report(study, kernels)
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|https?:", html)
    assert "prefers-color-scheme: dark" in html


def test_the_page_of_many_long_runs_stays_under_a_megabyte(make_run, report):
    layers = {"model.layers": 2}
    runs = [
        make_run(f"run-{seed}", seed=seed, steps=1500, changes=layers | {"model.dim": 64 + seed % 10},
                 code={"commit": "c0ffee", "dirty": True, "diff": f"{seed}" + "+line\n" * 8000})
        for seed in range(40)
    ]  # fmt: skip
    assert 200_000 < len(report(*runs).encode()) < 1_000_000


def test_text_of_the_run_is_escaped(make_run):
    run = make_run("a", changes={"name": "tiny <&>"}, result={"sample": "<script>alert(1)</script>"})
    html = write_page(run).read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "tiny &lt;&amp;&gt;" in html
    assert "+a &lt; b" in html


def test_without_a_sample_there_is_no_place_for_one(make_run):
    assert "A sample" not in write_page(make_run("a")).read_text()


def test_what_the_runs_share_is_said_once(make_run, report):
    html = report(make_run("a"), make_run("b", versions={"torch": "2.11.0"}))
    assert html.count("<td>backends</td>") == 1
    assert html.count("<td>versions</td>") == 2
    assert html.count("+a &lt; b") == 1
