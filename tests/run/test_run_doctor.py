import dataclasses

import pytest
from rich.console import Console

from sabrage.run.device import DeviceFacts, free_memory, host_memory, probe
from sabrage.run.doctor import Examination, Needs, examine, find_data, judge, render
from sabrage.run.units import count, duration, size

GPU = DeviceFacts(kind="cuda", name="GPU", memory=24 << 30, capability=(8, 6), triton="3.6.0")
FOUND = Examination(
    python="3.12", torch="2.11", cuda="13.0", driver="580", device=GPU, free_memory=20 << 30,
    free_disk=1 << 40, data=(),
)  # fmt: skip
NEEDS = Needs(name="base", num_parameters=124_000_000, smallest_memory=4 << 30, default_memory=12 << 30)


def test_a_recipe_that_fits_runs():
    assert judge(NEEDS, FOUND).answer == "runs"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"refusal": "fp8 needs compute capability 8.9"}, "fp8 needs"),
        ({"missing_data": "no shards in data/; sabrage data fetch"}, "no shards"),
        ({"smallest_memory": 30 << 30}, "smallest micro-batch"),
    ],
)
def test_a_recipe_that_lacks_something_cannot_run_and_says_what(change, why):
    verdict = judge(dataclasses.replace(NEEDS, **change), FOUND)
    assert verdict.answer == "cannot"
    assert why in verdict.why


def test_a_recipe_that_must_shrink_its_micro_batch_runs_slower():
    verdict = judge(dataclasses.replace(NEEDS, default_memory=22 << 30), FOUND)
    assert (verdict.answer, "smaller micro-batch" in verdict.why) == ("runs slower", True)


def test_a_large_recipe_on_a_processor_runs_slower_and_a_small_one_runs():
    found = dataclasses.replace(FOUND, device=DeviceFacts(kind="cpu", name="CPU", memory=64 << 30))
    assert judge(NEEDS, found).answer == "runs slower"
    assert judge(dataclasses.replace(NEEDS, num_parameters=500_000), found).answer == "runs"


def test_a_gpu_without_triton_runs_slower():
    found = dataclasses.replace(FOUND, device=dataclasses.replace(GPU, triton=None))
    assert "Triton" in judge(NEEDS, found).why


def test_the_examination_of_this_machine_can_be_rendered(tmp_path):
    (tmp_path / "train_000001.bin").write_bytes(bytes(1000))
    found = examine("cpu", folder=tmp_path, data_folders=(tmp_path, tmp_path / "absent"))
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        console.print(render(found, [judge(NEEDS, found)]))
    assert "1 shard, " in captured.get()
    assert found.device.name in captured.get()


def test_a_rendered_gpu_names_what_it_can_do():
    console = Console(width=160, force_terminal=False)
    with console.capture() as captured:
        console.print(render(FOUND, [judge(NEEDS, FOUND)]))
    text = captured.get()
    for word in ("compute capability", "8.6", "fp8", "no (needs", "20 GiB free", "124M", "runs"):
        assert word in text


def test_only_shards_count_as_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert find_data(tmp_path).num_shards == 0


def test_free_memory_of_the_host_is_at_most_its_memory():
    assert 0 < free_memory("cpu") <= host_memory() == probe("cpu").memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(0), "0"), (count(950), "950"), (count(12_400), "12.4k"), (count(490_123), "490k"),
        (count(999_700), "1.00M"), (count(143.5e6), "144M"), (count(1.24e9), "1.24B"),
        (size(9829 << 20), "9.60 GiB"), (size(512), "0.50 KiB"), (size(20 << 30), "20 GiB"),
        (duration(4.2), "4.2 s"), (duration(59.97), "1 min 00 s"), (duration(192), "3 min 12 s"),
        (duration(7500), "2 h 05 min"), (duration(0), "0.0 s"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(text, expected):
    assert text == expected
