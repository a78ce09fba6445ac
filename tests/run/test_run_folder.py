import json
import os
import subprocess
import sys
from datetime import datetime

import pytest

from sabrage.run.folder import RunError, RunFolder, read_run, write_json

NOON = datetime(2026, 11, 23, 12, 0, 5)


def make_run(path):
    folder = RunFolder(path).create()
    write_json(folder.manifest, {"recipe": {"name": "tiny"}})
    return folder


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    assert RunFolder(tmp_path / "a" / "b").create().path.is_dir()


def test_an_empty_folder_is_taken(tmp_path):
    assert RunFolder(tmp_path).create().path == tmp_path


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="neither empty nor a run; choose"):
        RunFolder(tmp_path).create()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file; choose"):
        RunFolder(tmp_path / "file").create()


def test_an_existing_run_is_refused_unless_resumed(tmp_path):
    make_run(tmp_path)
    with pytest.raises(RunError, match="holds a run already; choose another folder, or resume"):
        RunFolder(tmp_path).create()
    assert RunFolder(tmp_path).create(resume=True).manifest.exists()


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder(tmp_path).create(resume=True)


def test_default_names_do_not_collide_within_a_second(tmp_path):
    names = [RunFolder.fresh("tiny", root=tmp_path, now=NOON).path.name for _ in range(3)]
    assert names == ["tiny-20261123-120005", "tiny-20261123-120005-2", "tiny-20261123-120005-3"]


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"loss": 1.0})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"loss": 2.0})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_json_files_stay_strict_with_a_number_that_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"loss": [float("nan"), float("-inf")]})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "loss": ["nan", "-inf"]
    }


def test_a_run_can_be_read_before_it_has_logged_or_ended(tmp_path):
    make_run(tmp_path)
    run = read_run(tmp_path)
    assert (run.manifest["recipe"]["name"], run.records, run.result) == ("tiny", [], None)


def test_reading_what_is_no_run_names_the_remedy(tmp_path):
    with pytest.raises(RunError, match="give the folder of a run"):
        read_run(tmp_path)


def test_reading_runs_and_making_reports_imports_no_torch():
    code = (
        "import sys, sabrage.run.folder, sabrage.run.log, sabrage.run.clocks, sabrage.run.manifest, "
        "sabrage.report.page, sabrage.report.tables; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
