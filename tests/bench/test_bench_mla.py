import json
import math
from xml.etree import ElementTree

import pytest
import torch

from sabrage.bench import mla, mla_tune
from sabrage.bench.mla_grid import GridRun, chart, grid, needed_bytes, row, verdict, wrong
from sabrage.kernels.language import KernelError

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
CPU = torch.device("cpu")
RATES = (3e12, 8e14)
TINY = [GridRun(2, 40, 2, 1, False), GridRun(3, 30, 1, 2, True)]


def rows(*times: float) -> list[dict]:
    runs = grid(small=True)
    return [row(index, runs[index], taken, (1e-3, 1e-6), RATES) for index, taken in enumerate(times)]


def test_the_grid_is_that_of_flashmla() -> None:
    runs = grid()
    assert len(set(runs)) == 32
    assert {run.batch for run in runs} == {128}
    assert {run.mean for run in runs} == {4096, 8192}
    assert {run.heads for run in runs} == {16, 32, 64, 128}
    assert {run.queries for run in runs} == {1, 2}


def test_the_small_grid_is_a_part_of_every_kind_and_the_whole_one_fits_24_gigabytes() -> None:
    small = grid(small=True)
    assert len(small) == 8
    assert {run.varying for run in small} == {False, True}
    assert needed_bytes(grid()) < 24e9
    assert needed_bytes(small) < 2.5e9


def test_varying_lengths_scatter_around_the_mean_and_hold_the_queries() -> None:
    lengths = GridRun(128, 4096, 16, 2, True).lengths()
    assert len(set(lengths)) > 100
    assert min(lengths) >= 2
    assert sum(lengths) / 128 == pytest.approx(4096, rel=0.15)
    assert GridRun(128, 4096, 16, 2, False).lengths() == [4096] * 128


def test_a_run_counts_every_number_once_and_both_products() -> None:
    run = GridRun(128, 8192, 128, 2, False)
    assert run.flops() == 2 * 128 * 8192 * 256 * (576 + 512)
    assert run.memory_bytes() == 2 * (128 * 8192 * 576 + 128 * 256 * (576 + 512))


def test_a_row_holds_rates_and_their_shares_of_the_device() -> None:
    run = GridRun(128, 8192, 16, 1, False)
    found = row(3, run, 0.5, (1e-3, 1e-6), RATES)
    assert found["gigabytes"] == pytest.approx(run.memory_bytes() / 0.5e-3 / 1e9)
    assert found["of_copy"] == pytest.approx(found["gigabytes"] / 3000)
    assert found["of_product"] == pytest.approx(found["teraflops"] / 800)


@pytest.mark.parametrize(
    ("error", "cosine", "expected"),
    [(3e-3, 5e-6, False), (2e-2, 5e-6, True), (3e-3, 1e-3, True), (math.nan, math.nan, True)],
)
def test_a_result_is_wrong_when_error_or_cosine_is_off(error: float, cosine: float, expected: bool) -> None:
    assert wrong(error, cosine) is expected


def test_the_verdict_measures_the_distance_to_what_others_publish() -> None:
    found = rows(0.1, 0.2, 0.4)
    sentences = verdict(found)
    assert sentences[0].startswith("most memory: run 0,")
    assert f"{max(each['gigabytes'] for each in found) / 3000:.2f} of its 3,000 GB/s" in sentences[2]
    assert "an A100" in sentences[3]


def test_the_chart_is_sound_xml_with_a_point_a_run_and_its_levels() -> None:
    text = chart([1.0, 2.0, 3.0], label="GB/s", title="some <device>", levels=(("copy here", 4.0),))
    drawn = ElementTree.fromstring(text)
    places = [float(circle.get("cy", "nan")) for circle in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert places == sorted(places, reverse=True)
    assert "copy here" in text


def test_the_result_file_and_three_charts_are_written(tmp_path) -> None:
    mla.write(tmp_path / "made" / "mla.json", rows(0.1, 0.2), "some device", RATES)
    assert len(json.loads((tmp_path / "made" / "mla.json").read_text())["rows"]) == 2
    assert len(list((tmp_path / "made").glob("*.svg"))) == 3


def test_the_two_tables_of_a_run_share_no_page() -> None:
    for run in TINY:
        inputs = mla.make_inputs(run, mla.make_pool(TINY, CPU, torch.float32), torch.float32)
        used = []
        for table_BN in inputs.tables_BN:
            for b, length in enumerate(run.lengths()):
                used += table_BN[b, : -(-length // mla.PAGE)].tolist()
        assert len(set(used)) == len(used)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "find_device", lambda: (CPU, "a processor", RATES))
    monkeypatch.setattr(mla, "grid", lambda **_: TINY)
    monkeypatch.setattr(mla, "milliseconds", lambda call, tables_BN: 1.0)
    # The interpreter's bf16 is wrong.
    monkeypatch.setattr(mla, "DTYPE", torch.float32)


@interpreted
def test_a_tiny_grid_is_right_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pretend(monkeypatch)
    found = mla.measure(out=tmp_path / "mla.json")
    assert [each["index"] for each in found] == [0, 1]
    assert all(each["error"] < 1e-5 for each in found)


@interpreted
def test_a_wrong_result_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    right = mla.decode
    monkeypatch.setattr(mla, "decode", lambda *given, **options: (1.02 * right(*given, **options)[0], None))
    with pytest.raises(KernelError, match=r"is wrong: error 0\.02"):
        mla.measure()


def test_tuning_tries_at_most_24_tiles_and_those_of_the_tables_of_hopper() -> None:
    from sabrage.kernels.paged_latent import HOPPER

    assert len(mla_tune.TRIED) == len(set(mla_tune.TRIED)) <= 24
    assert set(HOPPER.values()) <= set(mla_tune.TRIED)
