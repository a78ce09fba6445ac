import os
import subprocess
from pathlib import Path

import pytest

from sabrage.cli import parse
from sabrage.cli.train import Train
from sabrage.recipes import changed, find

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT = SCRIPTS / "measure_parts.sh"


def said_by(script, arguments, tmp_path):
    """The words of every python3 command that the script gives when all its stages run."""
    stub = tmp_path / "python3"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/said\n')
    stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(script), *arguments, str(tmp_path / "out")],
        check=True,
        env=os.environ | {"PATH": path, "COMMIT": "abc"},
        capture_output=True,
    )
    return [line.split() for line in (tmp_path / "said").read_text().splitlines()]


@pytest.fixture
def commands(tmp_path):
    return said_by(SCRIPT, ["data"], tmp_path)


def test_every_stage_gives_its_commands(commands):
    told = [" ".join(words[:3]) for words in commands]
    once = ["-m pytest -m", "-m sabrage.bench.kernels --out", "-m sabrage.bench.step base"]
    assert {name: told.count(name) for name in once} == dict.fromkeys(once, 1)
    assert told.count("-m sabrage study") == 2
    assert told.count("-m sabrage train") == 11


def test_the_runs_and_studies_of_the_script_parse_and_can_run(commands):
    for words in commands:
        if words[:2] == ["-m", "sabrage"]:
            command = parse(words[2:])
            if isinstance(command, Train):
                changed(command.recipe, command.set).validate()


def test_the_recipes_of_the_script_exist(commands):
    (steps,) = [words for words in commands if "sabrage.bench.step" in words]
    names = steps[2 : steps.index("--out")]
    assert len(names) > 10
    assert all(find(name).name == name for name in names)
    assert steps[-2:] == ["--commit", "abc"]


def test_an_unknown_stage_fails(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT), "data", str(tmp_path), "nonsense"], capture_output=True)
    assert done.returncode == 1


def test_the_script_of_the_experts_gives_commands_that_parse(tmp_path):
    commands = said_by(SCRIPTS / "measure_experts.sh", ["data", "kinds"], tmp_path)
    parsed = [parse(words[2:]) for words in commands if words[:2] == ["-m", "sabrage"]]
    # Two studies, and the experts of four recipes.
    assert [type(command).__name__ for command in parsed] == ["Study", *["Experts"] * 4, "Study"]
    assert len(commands) == 3 + len(parsed)
    (steps,) = [words for words in commands if "sabrage.bench.step" in words]
    assert [find(name).name for name in steps[2 : steps.index("--out")]][1:] == [
        command.run_folder.name.partition("--")[0]
        for command in parsed
        if type(command).__name__ == "Experts"
    ]
