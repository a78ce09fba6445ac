import shutil
from collections import namedtuple

import numpy as np
import pytest
from rich.console import Console

from sabrage.data.fineweb import fetch
from sabrage.data.shards import find_shards, open_shard, write_shard
from sabrage.parts import DataError

QUIET = Console(quiet=True)
NAMES = [
    "fineweb_val_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_train_000002.bin",
    "fineweb_train_000003.bin",
]
Usage = namedtuple("Usage", "total used free")


class Hub:
    """Serves small shards and, on request, fails on a name or cuts it short a number of times."""

    def __init__(self):
        self.served = []
        self.failures = {}
        self.short = {}

    def __call__(self, name, staging):
        self.served.append(name)
        staging.mkdir(exist_ok=True)
        path = staging / name
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            (staging / f"{name}.incomplete").write_bytes(b"half")
            raise ConnectionError("the line went dead")
        write_shard(path, np.arange(1000))
        if self.short.get(name, 0):
            self.short[name] -= 1
            path.write_bytes(path.read_bytes()[:1500])
        return path


@pytest.fixture
def hub():
    return Hub()


def get(folder, hub, num_shards=3):
    return fetch(folder, num_shards=num_shards, download=hub, console=QUIET)


def test_validation_comes_first_and_everything_is_whole(tmp_path, hub):
    paths = get(tmp_path / "fineweb", hub)
    assert hub.served == [path.name for path in paths] == NAMES
    assert all(len(open_shard(path, vocab_size=1000)) == 1000 for path in paths)
    assert sorted(path.name for path in (tmp_path / "fineweb").iterdir()) == sorted(NAMES)
    trains, _ = find_shards(tmp_path / "fineweb")
    assert [path.name for path in trains] == NAMES[1:]


def test_what_is_there_and_whole_is_kept(tmp_path, hub):
    get(tmp_path, hub, num_shards=1)
    hub.served.clear()
    get(tmp_path, hub, num_shards=2)
    assert hub.served == [NAMES[2]]


def test_a_short_file_of_an_earlier_time_is_fetched_again(tmp_path, hub):
    get(tmp_path, hub)
    (tmp_path / NAMES[2]).write_bytes((tmp_path / NAMES[2]).read_bytes()[:-1])
    hub.served.clear()
    get(tmp_path, hub)
    assert hub.served == [NAMES[2]]
    open_shard(tmp_path / NAMES[2], vocab_size=1000)


def test_after_a_failure_midway_the_same_call_goes_on(tmp_path, hub):
    hub.failures[NAMES[2]] = 1
    with pytest.raises(DataError, match=r"fineweb_train_000002\.bin.*the line went dead.*same command again"):
        get(tmp_path, hub)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == sorted(NAMES[:2])
    assert (tmp_path / ".fetching" / f"{NAMES[2]}.incomplete").exists()
    hub.served.clear()
    get(tmp_path, hub)
    assert hub.served == NAMES[2:]


def test_a_short_download_is_tried_once_more(tmp_path, hub):
    hub.short[NAMES[1]] = 1
    get(tmp_path, hub)
    assert hub.served == [NAMES[0], NAMES[1], NAMES[1], *NAMES[2:]]


def test_a_file_that_stays_short_is_an_error_and_never_lands(tmp_path, hub):
    hub.short[NAMES[1]] = 2
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: came incomplete .* 2 times .*truncated"):
        get(tmp_path, hub)
    assert [path.name for path in tmp_path.glob("*.bin")] == NAMES[:1]
    assert get(tmp_path, hub)[1].exists()


@pytest.mark.parametrize("num_shards", [0, 51, -1])
def test_only_the_benchmarks_shards_can_be_asked_for(tmp_path, hub, num_shards):
    with pytest.raises(ValueError, match=rf"got {num_shards} shards, allowed: 1 to 50"):
        get(tmp_path, hub, num_shards=num_shards)
    assert not hub.served


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 700_000_000))
    with pytest.raises(DataError, match=r"4 shards take 0\.8 GB, 0\.7 GB are free; ask for at most 2 more"):
        get(tmp_path, hub)
    assert not hub.served
    get(tmp_path, hub, num_shards=2)


def test_without_a_network_the_hub_client_ends_in_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"fineweb_val_000000\.bin: the download .* failed"):
        fetch(tmp_path, num_shards=1, console=QUIET)
