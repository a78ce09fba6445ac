import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from contracts import shrink

from sabrage.bench import decode
from sabrage.cli import main
from sabrage.config import ConfigError
from sabrage.recipes import find

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipes():
    """Two tiny ones of different names."""
    return [replace(shrink(find(name)), name=name) for name in ("nocap", "base")]


def test_every_recipe_cache_length_and_batch_is_a_row_and_a_point_of_the_chart(recipes, tmp_path, one_thread):
    out = tmp_path / "made" / "decode.json"
    decode.measure(recipes, batches=[1, 3], lengths=[20, 100], device=CPU, out=out)
    rows = json.loads(out.read_text())["rows"]
    assert len({(row["recipe"], row["cache"], row["length"], row["batch"]) for row in rows}) == 16
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
    drawn = ElementTree.parse(out.with_suffix(".svg")).getroot()
    named = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f"{named}circle")) == len(rows)
    assert len(drawn.findall(f"{named}polyline")) == len(rows) / 2
    texts = {text.text for text in drawn.findall(f"{named}text")}
    assert {"nocap", "base", "length 20", "length 100"} <= texts


def test_the_last_step_sees_a_sequence_of_the_whole_length(recipes, one_thread):
    model = decode.build_model(recipes[0].model, seed=0)
    for paged in (False, True):
        engine = decode.engine_at(model, batch=2, length=100, paged=paged)
        for _ in range(decode.STEPS):
            assert len(engine.step()) == 2
        assert engine.view.lengths_B.tolist() == [100, 100]


def test_a_cache_that_does_not_fit_is_a_row_that_says_so(recipes, monkeypatch):
    def full(*given, **options):
        raise torch.cuda.OutOfMemoryError

    for name, stand_in in (("engine_at", full), ("free_memory", lambda device: 9_999)):
        with monkeypatch.context() as patch:
            patch.setattr(decode, name, stand_in)
            (row, _) = decode.measure(recipes[:1], batches=[1], lengths=[20], device=CPU)
        assert row["note"] == "does not fit into the device's memory"
        assert "step_ms" not in row


def test_sizes_that_cannot_be_measured_are_told_all_at_once(recipes):
    with pytest.raises(ConfigError, match=r"batches \[0\].*lengths \[16, 999\].*max_length=128"):
        decode.measure(recipes, batches=[0], lengths=[16, 999], device=CPU)


def test_the_command_line_takes_recipes_by_name(capsys):
    assert main(["bench", "decode", "bse"]) == 1
    assert "did you mean 'base'?" in capsys.readouterr().err
    assert main(["bench", "decode", "demo", "--batches", "1", "2", "--lengths", "20", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("demo") == 4
