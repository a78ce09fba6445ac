import pytest
import torch
from contracts import shrink

from sabrage.bench import nocap_mini, step
from sabrage.bench.result import write_result
from sabrage.recipes import find
from sabrage.report.tables import read_results, table
from sabrage.run.device import DeviceFacts, probe
from sabrage.run.folder import Run

ENDED = {
    "steps": 272,
    "tokens": 142_606_336,
    "validation_loss": 5.5,
    "train_seconds": 280.0,
    "nocap_seconds": 320.0,
    "wall_seconds": 340.0,
    "median_step_seconds": 1.03,
    "tokens_per_second": 505_000.0,
    "mfu": 0.4,
    "peak_memory": 2**34,
    "seed": 0,
}


def test_a_result_file_becomes_a_table_with_its_numbers(tmp_path):
    run = Run(path=tmp_path, manifest={}, records=[], result=ENDED)
    rows = [nocap_mini.row("cold", run)]
    write_result(
        tmp_path / "nocap-mini.json",
        name="nocap-mini",
        device="a card",
        columns=nocap_mini.COLUMNS,
        rows=rows,
    )
    text = table(read_results(tmp_path)["nocap-mini"])
    for shown in ("cold", "142,606,336", "5.5000", "60.0", "505,000", "40.0%", "16.0"):
        assert shown in text


def test_a_result_file_names_versions_and_commit(tmp_path):
    path = write_result(tmp_path / "x.json", name="x", device="d", columns=[], rows=[], commit="abc")
    result = read_results(path.parent)["x"]
    assert result["commit"] == "abc"
    assert result["versions"]["torch"] == torch.__version__
    assert result["track"] is None


def test_a_recipe_that_the_device_refuses_is_a_row_that_says_so():
    facts = DeviceFacts(kind="cuda", name="an old card", memory=0, capability=(7, 5))
    (row,) = step.measure(find("fp8"), facts, torch.device("cpu"))
    assert row.keys() == {"recipe", "note"}
    assert "8.9" in row["note"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_measured_with_its_optimizer():
    device = torch.device("cuda", 0)
    (row,) = step.measure(shrink(find("base")), probe(device), device)
    assert 0 < row["optimizer_ms"] < row["step_ms"]
    assert row["tokens_per_second"] > 0
