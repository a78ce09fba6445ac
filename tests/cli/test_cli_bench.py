import pytest
import torch

from sabrage.bench import nocap_mini, step
from sabrage.cli import main

COMMANDS = {
    "kernels": ["kernels"],
    "attention": ["attention", "--full", "--out", "made/attention.json"],
    "step": ["step", "base", "--out", "made/steps.json"],
    "stages": ["step", "base", "--stages", "--out", "made/steps.json"],
    "breakdown": ["breakdown", "base", "--out", "made/breakdown.json"],
    "baseline": ["baseline", "--data", "data", "--out", "made"],
    "mla": ["mla", "--small", "--out", "made/mla.json"],
    "tiles": ["mla", "--tune"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_without_a_cuda_device_a_benchmark_says_so_and_makes_nothing(words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 1
    assert "need a CUDA device and torch sees none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "rotary_nrm"], "did you mean 'rotary_norm'?"),
        (["step", "--out", "x.json"], "got no recipe to time"),
        (["step", "base", "bse", "--out", "x.json"], "unknown recipe 'bse' (did you mean 'base'?)"),
        (["step", "base+model.layer=6", "--out", "x.json"], "did you mean 'layers'?"),
        (["breakdown"], "got no recipe to take apart"),
        (["breakdown", "bse"], "unknown recipe 'bse' (did you mean 'base'?)"),
        (["breakdown", "base", "--stage", "1"], "got stage 1, allowed: 0 to 0 for base"),
        (["breakdown", "base", "--kernels", "-1"], "got kernels=-1, allowed: 0 or more"),
    ],
)
def test_a_name_that_is_missing_or_misspelt_is_told_before_anything_is_measured(words, message, capsys):
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err


def test_the_options_reach_the_measurement(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(step, "main", asked.append)
    monkeypatch.setattr(nocap_mini, "measure", lambda *given, **options: asked.append(given))
    out = tmp_path / "made" / "cost.json"
    names = ["base", "nocap+model.layers=6"]
    assert main(["bench", "step", *names, "--out", str(out)]) == 0
    assert main(["bench", "step", "base", "--stages", "--out", str(out)]) == 0
    assert main(["bench", "baseline", "--data", str(tmp_path), "--out", str(tmp_path / "other")]) == 0
    given = ["--out", str(out), "--name", "cost"]
    assert asked == [[*names, *given], ["base", *given, "--stages"], (tmp_path, tmp_path / "other")]
    assert (tmp_path / "made").is_dir()
    assert (tmp_path / "other").is_dir()
