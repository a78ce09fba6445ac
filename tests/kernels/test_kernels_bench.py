import io
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from sabrage.bench import kernels as bench
from sabrage.bench.result import table
from sabrage.kernels.cases import Case
from sabrage.kernels.catalogue import OPERATIONS, RESIDUAL_NORM
from sabrage.kernels.language import KernelError

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
CPU = torch.device("cpu")
ROWS = [
    {"operation": "one", "case": "a < b", "speedup": 1.5, "kernel_ms": 2.0, "verdict": "faster"},
    {
        "operation": "two",
        "case": "c",
        "speedup": 0.5,
        "kernel_ms": 4.0,
        "verdict": "neither faster nor smaller",
    },
    {"operation": "three", "case": "d", "verdict": "fails the gate: r: error 1, allowed 0"},
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_nothing_is_measured() -> None:
    with pytest.raises(KernelError, match="need a CUDA device"):
        bench.measure()


def test_an_unknown_kernel_is_named_with_the_nearest() -> None:
    with pytest.raises(KernelError, match="did you mean 'rotary_norm'"):
        bench.measure("rotary_nrm")


def test_there_is_no_number_where_the_gate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "failures", lambda *_: ["r: error 1, allowed 0"])
    case = Case("here", {"N": 4, "D": 16, "weights": 0})
    row = bench.row(RESIDUAL_NORM, case, CPU, (1.0, 1.0), torch.empty(0))
    assert row == {
        "operation": "residual_norm",
        "case": "here",
        "verdict": "fails the gate: r: error 1, allowed 0",
    }


@interpreted
@pytest.mark.parametrize(("kernel_ms", "verdict"), [(2.0, "faster"), (2.95, "neither faster nor smaller")])
def test_the_verdict_is_time_and_memory_against_torch_compile(
    monkeypatch: pytest.MonkeyPatch, kernel_ms: float, verdict: str
) -> None:
    def pretend(work: bench.Work, flush: torch.Tensor) -> tuple[list[float], float] | None:
        work()
        return next(found)

    found = iter([([1.0, kernel_ms, 4.0], 0.9), ([2.0, 3.0, 4.0], 1.0), None])
    monkeypatch.setattr(bench, "timed", pretend)
    # The interpreter's bf16 is wrong, and this is not about values.
    monkeypatch.setattr(bench, "failures", lambda *_: [])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = Case("here", {"N": 4, "D": 16, "weights": 1})
    row = bench.row(RESIDUAL_NORM, case, CPU, (1e12, 1e15), torch.empty(0))
    assert row["speedup"] == 3.0 / kernel_ms
    assert row["verdict"] == verdict
    assert "eager_ms" not in row
    assert row["ceiling"] == pytest.approx(8 * 2 * 4 * 16 / 1e12 * 1e3 / kernel_ms)


def test_the_chart_is_sound_xml_with_a_bar_for_every_measured_row() -> None:
    drawn = ElementTree.fromstring(bench.chart(ROWS, "some <device>"))
    bars = drawn.findall("{http://www.w3.org/2000/svg}rect")
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert len(widths) == 2
    assert widths[0] == pytest.approx(3 * widths[1])


def test_the_table_shows_every_row_and_dashes_for_what_was_not_measured() -> None:
    text = io.StringIO()
    Console(width=250, file=text).print(table(ROWS, "device", bench.COLUMNS))
    lines = [line for line in text.getvalue().splitlines() if "fails the gate" in line]
    assert len(lines) == 1
    assert lines[0].count(" - ") == 10


def test_every_operation_has_something_to_measure() -> None:
    assert [
        operation.name for operation in OPERATIONS if not any(case.measured for case in operation.cases)
    ] == []


def test_a_measured_case_is_gated_on_a_thirty_second_of_its_tokens() -> None:
    small = Case("stream", {"N": 65536, "D": 768}, measured=True).shrunk()
    assert small.sizes == {"N": 2048, "D": 768}
