"""The attention benchmark without a device: what it plans, what it counts as work, what a cell says."""

import io
from collections import Counter
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from sabrage.bench import attention as bench
from sabrage.bench.attention import Cell, cells
from sabrage.bench.attention_chart import COLOURS, chart
from sabrage.bench.result import table
from sabrage.context import Context
from sabrage.run.device import DeviceFacts

CPU = torch.device("cpu")
HOPPER = DeviceFacts(kind="cuda", name="H100", memory=80 << 30, capability=(9, 0))
ROWS = [
    {"mask": "causal", "width": 64, "length": length, "backend": "cudnn", "forward_tflops": rate,
     "backward_tflops": rate / 2, "ceiling": 0.4, "error": 1.1, "note": ""}
    for length, rate in ((512, 100.0), (2048, 300.0))
]  # fmt: skip
ROWS.append({"mask": "causal", "width": 64, "length": 2048, "backend": "plain", "note": "out of memory"})


def test_every_backend_is_planned_for_the_masks_that_it_knows():
    planned = cells(full=True)
    assert len(set(planned)) == len(planned)
    assert {cell.length for cell in planned} == {512, 1024, 2048, 4096, 8192, 16384}
    per_mask = Counter((cell.mask, cell.backend) for cell in planned)
    assert per_mask["causal", "cudnn"] == per_mask["documents", "flex"] == per_mask["window", "fa3"] == 12
    assert ("window", "cudnn") not in per_mask
    assert ("documents", "fa3") not in per_mask
    assert {cell.length for cell in cells(full=False)} == {2048}
    assert all(cell.batch * cell.length == 65_536 and cell.heads * cell.width == 768 for cell in planned)


@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
def test_work_is_the_pairs_that_the_mask_shows(mask, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 4096)
    cell = Cell(mask, 64, 1024, "flex")
    shown = bench.visible(Context(documents_BT=cell.documents()), 1024, CPU, window=cell.window)
    assert cell.pairs() == shown.expand(cell.batch, -1, -1, -1).sum().item()
    assert cell.flops() == (4 * cell.pairs() * 768, 10 * cell.pairs() * 768)
    if mask == "documents":
        assert cell.documents().unique().numel() > cell.batch


def test_a_refused_backend_is_a_row_that_says_so():
    cpu = DeviceFacts(kind="cpu", name="a CPU", memory=1)
    found = bench.row(Cell("causal", 64, 2048, "cudnn"), cpu, CPU, 1e15, torch.empty(0))
    assert found["note"].startswith("attention backend 'cudnn' needs a CUDA device")
    assert "forward_tflops" not in found


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.cuda.OutOfMemoryError("much"), "out of memory"),
        (RuntimeError("no kernel\nmore"), "fails: RuntimeError: no kernel"),
    ],
)
def test_a_cell_that_fails_says_so_and_has_no_numbers(error, note, monkeypatch):
    def fail(*given):
        raise error

    monkeypatch.setattr(bench, "measured", fail)
    found = bench.row(Cell("causal", 64, 2048, "cudnn"), HOPPER, CPU, 1e15, torch.empty(0))
    assert found == {"mask": "causal", "width": 64, "length": 2048, "backend": "cudnn", "note": note}


@pytest.fixture
def small(monkeypatch):
    """Cells of 200 tokens in two rows, which a CPU computes."""
    monkeypatch.setattr(bench, "TOKENS", 200)
    monkeypatch.setattr(bench, "times", lambda work, flush: (work(), [0, next(clock), 0])[1])
    clock = iter([1.0, 3.0])


def test_rates_are_work_over_the_time_of_each_pass(small):
    cell = Cell("documents", 64, 100, "sdpa")
    found = bench.measured(cell, CPU, 1e12, torch.empty(0))
    first, second = cell.flops()
    assert found["forward_tflops"] == pytest.approx(first / 1e-3 / 1e12)
    assert found["backward_tflops"] == pytest.approx(second / 2e-3 / 1e12)
    assert found["ceiling"] == pytest.approx((first + second) / 3e-3 / 1e12)
    assert 0 < found["error"] <= 2


def test_there_is_no_number_where_the_error_is_too_large(small, monkeypatch):
    monkeypatch.setattr(bench, "attend", lambda q, k, v, context, **options: 1.1 * v + 0 * q + 0 * k)
    found = bench.measured(Cell("window", 64, 100, "sdpa"), CPU, 1e12, torch.empty(0))
    assert found["note"].startswith("fails the gate: out: error")
    assert "forward_tflops" not in found


def test_the_chart_is_sound_xml_with_a_dot_for_every_number():
    drawn = ElementTree.fromstring(chart(ROWS, "some <device>", 600.0))
    space = "{http://www.w3.org/2000/svg}"
    dots = [dot for dot in drawn.findall(f"{space}circle") if dot.get("r") == "3"]
    assert len(dots) == 4
    heights = [float(dot.get("cy")) for dot in dots]
    assert heights[0] > heights[1], "more is higher"
    assert len(drawn.findall(f"{space}polyline")) == 2
    assert set(bench.BACKENDS) == set(COLOURS)


def test_the_table_shows_every_row_and_dashes_for_what_was_not_measured():
    text = io.StringIO()
    Console(width=200, file=text).print(table(ROWS, "device", bench.COLUMNS))
    lines = [line for line in text.getvalue().splitlines() if "out of memory" in line]
    assert len(lines) == 1
    assert lines[0].count(" - ") == 4
