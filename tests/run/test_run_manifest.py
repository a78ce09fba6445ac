import json
import os
import subprocess
from pathlib import Path

import pytest

from sabrage.run.device import DeviceFacts
from sabrage.run.log import encode
from sabrage.run.manifest import MAX_DIFF_CHARACTERS, code_state, impersonal, make_manifest

FACTS = DeviceFacts(kind="cpu", name="CPU", memory=1)


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def manifest(**changes):
    values = {"seed": 3, "device": FACTS, "backends": {"attention": "sdpa"}, "data": {}, "command": ["x"]}
    return make_manifest({"part": "Recipe", "name": "tiny"}, **(values | changes))


def test_the_manifest_is_strict_json_with_everything_in_it():
    made = json.loads(encode(manifest()))
    assert made["recipe"] == {"part": "Recipe", "name": "tiny"}
    assert (made["seed"], made["backends"], made["device"]["name"]) == (3, {"attention": "sdpa"}, "CPU")
    assert {"python", "torch", "triton", "numpy", "sabrage", "cuda", "driver", "os"} == set(made["versions"])
    assert made["started"].endswith("+00:00")


def test_a_clean_checkout_gives_its_commit_and_no_diff(checkout):
    state = code_state(checkout / "code.py")
    assert len(state["commit"]) == 40
    assert (state["dirty"], state["diff"]) == (False, "")


def test_uncommitted_changes_are_recorded(checkout):
    (checkout / "code.py").write_text("a = 2\n")
    (checkout / "new.py").write_text("")
    state = code_state(checkout / "code.py")
    assert state["dirty"]
    assert "+a = 2" in state["diff"]
    assert state["untracked"] == ["new.py"]


def test_a_huge_diff_is_cut_and_its_size_told(checkout):
    (checkout / "code.py").write_text("x" * (MAX_DIFF_CHARACTERS + 1000))
    state = code_state(checkout / "code.py")
    assert len(state["diff"]) == MAX_DIFF_CHARACTERS < state["diff_characters"]


def test_an_installed_copy_inside_a_strange_checkout_is_not_taken_for_it(checkout):
    (checkout / "installed.py").write_text("")
    assert code_state(checkout / "installed.py") is None


def test_code_outside_any_checkout_has_no_state(tmp_path):
    assert code_state(tmp_path / "code.py") is None


def test_paths_become_relative_and_the_user_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(os, "getcwd", lambda: "/home/alice/work")
    told = (
        "--out=/home/alice/work/runs/a --cache /home/alice/.cache /scratch/alice/data /homes/alice2 a/alice/b"
    )
    assert impersonal(told) == "--out=./runs/a --cache ~/.cache /scratch/~/data /homes/alice2 a/alice/b"


def test_a_home_or_working_folder_at_the_root_leaves_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(os, "getcwd", lambda: "/")
    assert impersonal("/data/shards") == "/data/shards"


def test_every_text_of_the_manifest_is_impersonal(monkeypatch):
    home = str(Path.home())
    made = encode(
        manifest(command=[f"{home}/bin/sabrage", "train", f"{home}/data"], data={"folder": f"{home}/d"})
    )
    assert f"{home}/" not in made
    assert json.loads(made)["command"] == ["sabrage", "train", "~/data"]
