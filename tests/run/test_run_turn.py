import subprocess
import sys
from contextlib import contextmanager

import pytest

from sabrage.run.turn import TURN, shares_device, turn, turn_file

# Says when it has the turn, and keeps it until it is told to go or killed.
HOLDER = "from sabrage.run.turn import turn\nwith turn():\n    print('mine', flush=True)\n    input()\n"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(TURN, str(tmp_path / "gpu.turn"))
    return tmp_path / "gpu.turn"


@contextmanager
def started():
    """A process that asks for the turn; killed in the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def holder(file):
    with started() as process:
        assert process.stdout.readline() == "mine\n"
        yield process


@pytest.fixture
def waiting(holder):
    with started() as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        yield process


def test_the_next_has_its_turn_when_the_one_before_is_done(holder, waiting):
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert waiting.stdout.readline() == "mine\n"


def test_whoever_is_killed_gives_up_its_turn(holder, waiting):
    holder.kill()
    assert waiting.stdout.readline() == "mine\n"


def test_a_turn_ends_with_its_block(file):
    for _ in range(2):
        with turn():
            assert file.exists()


def test_nobody_waits_where_nothing_is_shared(monkeypatch):
    monkeypatch.delenv(TURN, raising=False)
    assert not shares_device()
    with turn(), turn():
        pass


def test_gpus_have_files_of_their_own():
    assert turn_file("0") != turn_file("1")
    assert turn_file("0") == turn_file("0")
