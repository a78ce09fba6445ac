import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

from sabrage.run import checkpoint
from sabrage.run.checkpoint import (
    DESCRIPTION,
    TENSORS,
    CheckpointError,
    load_newest,
    newest,
    newest_step,
    save,
)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(63, 17, generator=generator), "step": torch.tensor(float(seed))}


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def forbid(text):
    raise AssertionError(f"unexpected warning: {text}")


@pytest.fixture
def two(tmp_path):
    """A folder with good checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path, step, tensors(step), {"block": step})
    return tmp_path


def load_with_warnings(folder):
    warnings = []
    return load_newest(folder, warn=warnings.append), warnings


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn],
)
def test_every_number_format_comes_back_bit_for_bit(tmp_path, dtype):
    saved = {"matrix": torch.arange(21).reshape(3, 7).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    save(tmp_path, 5, saved, {})
    loaded = load_newest(tmp_path, warn=forbid).tensors
    for name, tensor in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_values_come_back_as_they_were(tmp_path):
    meta = {"loss": 3.3821, "tiny": 1e-300, "target": None, "names": ["a", "b"], "nested": {"step": 7}}
    save(tmp_path, 5, tensors(), meta)
    loaded = load_newest(tmp_path, warn=forbid)
    assert (loaded.step, loaded.meta) == (5, meta)


def test_aliases_views_transposes_and_gradients_are_saved_by_value(tmp_path):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    saved = {
        "base": base, "alias": base, "part": base[2:4], "turned": base.T,
        "parameter": torch.nn.Parameter(base), "empty": torch.empty(0, 3), "empty too": torch.empty(0),
    }  # fmt: skip
    save(tmp_path, 1, saved, {})
    assert same(load_newest(tmp_path, warn=forbid).tensors, {name: t.detach() for name, t in saved.items()})


def test_saving_leaves_the_tensors_as_they_are(tmp_path):
    saved = tensors()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    save(tmp_path, 1, saved, {})
    load_newest(tmp_path, warn=forbid).tensors["weight"].zero_()
    assert same(saved, before)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 12):
        save(tmp_path, step, tensors(step), {}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000003",
        "step-00000012",
    ]
    assert newest_step(tmp_path) == 12
    assert newest(tmp_path) == (12, load_newest(tmp_path, warn=print).meta)


def test_one_can_be_kept(two):
    save(two, 3, tensors(3), {}, keep=1)
    assert [path.name for path in two.iterdir()] == ["step-00000003"]


def test_no_checkpoint_yet_is_none(tmp_path):
    assert load_newest(tmp_path / "checkpoints", warn=forbid) is None
    assert newest_step(tmp_path / "checkpoints") is None


def truncate(folder):
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit_of_the_tensors(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(data)


def flip_a_digit_of_the_values(folder):
    path = folder / DESCRIPTION
    path.write_text(path.read_text().replace('"block": 2', '"block": 3'))


def halve_the_description(folder):
    path = folder / DESCRIPTION
    path.write_text(path.read_text()[:40])


DAMAGES = {
    "a truncated tensor file": truncate,
    "a flipped bit": flip_a_bit_of_the_tensors,
    "a flipped digit": flip_a_digit_of_the_values,
    "a half-written description": halve_the_description,
    "an empty description": lambda folder: (folder / DESCRIPTION).write_text(""),
    "a description of another kind": lambda folder: (folder / DESCRIPTION).write_text("[1]"),
    "a missing description": lambda folder: (folder / DESCRIPTION).unlink(),
    "a missing tensor file": lambda folder: (folder / TENSORS).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(two, damage):
    damage(two / "step-00000002")
    loaded, warnings = load_with_warnings(two)
    assert (loaded.step, loaded.meta) == (1, {"block": 1})
    assert same(loaded.tensors, tensors(1))
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]
    assert newest_step(two) == 1


def test_all_damaged_is_an_error_that_names_them(two):
    for path in two.iterdir():
        truncate(path)
    with pytest.raises(CheckpointError, match=r"step-00000001, step-00000002\); start the run anew"):
        load_with_warnings(two)


def test_what_a_killed_process_left_is_ignored_and_cleared_by_the_next_save(two):
    partial = two / ".step-00000003.partial"
    shutil.copytree(two / "step-00000002", partial)
    truncate(partial)
    assert load_newest(two, warn=forbid).step == 2
    save(two, 3, tensors(3), {})
    assert not partial.exists()
    assert load_newest(two, warn=forbid).step == 3


def test_going_back_drops_the_abandoned_later_checkpoints_when_the_new_one_is_complete(two):
    truncate(two / "step-00000002")
    save(two, 2, tensors(9), {"block": 9})
    loaded, warnings = load_with_warnings(two)
    assert (loaded.meta, warnings) == ({"block": 9}, [])
    assert len(list(two.iterdir())) == 2


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_the_library(*arguments):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "name", "failure"),
    [
        (checkpoint, "save_file", no_space),
        (checkpoint, "save_file", no_space_in_the_library),
        (checkpoint, "write_json", no_space),
        (checkpoint.Path, "rename", no_space),
        (checkpoint.Path, "mkdir", no_space),
        (os, "fsync", no_space),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_rubbish(two, monkeypatch, place, name, failure):
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failure)
        with pytest.raises(CheckpointError, match=r"step 3 could not be written.*No space left"):
            save(two, 3, tensors(3), {"block": 3})
    assert sorted(path.name for path in two.iterdir()) == ["step-00000001", "step-00000002"]
    assert same(load_newest(two, warn=forbid).tensors, tensors(2))


def test_nothing_old_is_deleted_before_the_new_one_is_complete(two, monkeypatch):
    removed = []
    complete = []

    def watch(path, **options):
        removed.append(path.name)
        complete.append((two / "step-00000003" / DESCRIPTION).exists())

    monkeypatch.setattr(shutil, "rmtree", watch)
    save(two, 3, tensors(3), {})
    assert (removed, complete) == (["step-00000001"], [True])


def test_a_checkpoint_holds_only_tensors_and_json(two):
    files = {path.name for path in (two / "step-00000002").iterdir()}
    assert files == {TENSORS, DESCRIPTION}
    assert json.loads((two / "step-00000002" / DESCRIPTION).read_text())["step"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_the_gpu_are_saved_and_can_be_loaded_back_there(tmp_path):
    saved = {name: tensor.cuda() for name, tensor in tensors().items()}
    save(tmp_path, 1, saved, {})
    assert same(load_newest(tmp_path, warn=forbid).tensors, tensors())
    assert same(load_newest(tmp_path, warn=forbid, device="cuda").tensors, saved)
