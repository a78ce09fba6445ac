import json

import pytest
import torch

from sabrage.cli import main


@pytest.fixture
def switch():
    """The process's matrix precision is put back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["Fp32", {"part": "Fp16", "fp16_accumulation": [r"^model\.head$"]}])
def test_a_run_is_scored_in_its_own_formats_whatever_the_process_has_set_before(
    precision, tiny_options, tmp_path, monkeypatch, one_thread, switch, capsys
):
    monkeypatch.chdir(tmp_path)
    named = ["--set", f"precision={precision if isinstance(precision, str) else json.dumps(precision)}"]
    assert main(["train", "demo", *tiny_options, *named, "--out", "run"]) == 0
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["validation_loss"]
    switch("medium")
    capsys.readouterr()
    assert main(["eval", "run", "--device", "cpu"]) == 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert float(capsys.readouterr().out.split()[2]) == pytest.approx(trained, abs=2e-3)
