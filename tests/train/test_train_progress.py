import io
import sys

import pytest
from rich.console import Console

from sabrage.train.progress import Display, Progress


class Time:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def plain(total, *, seconds_per_step, steps=None):
    """The lines of a run on something that is no terminal."""
    stream, time = io.StringIO(), Time()
    with Progress(total, console=Console(file=stream, width=200, highlight=False), now=time) as progress:
        for step in range(1, (steps or total) + 1):
            time.seconds += seconds_per_step
            progress.update(
                step=step, loss=10 / step, tokens_per_second=490_123, mfu=0.412, memory=9829 << 20
            )
    return stream.getvalue().splitlines()


def test_lines_are_seconds_apart_and_the_first_and_the_last_step_are_always_shown():
    lines = plain(100, seconds_per_step=0.4)
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, 14, 27, 40, 53, 66, 79, 92, 100]


def test_the_last_step_of_an_interrupted_run_is_shown():
    assert plain(100, seconds_per_step=0.1, steps=7)[-1].startswith("step 7/100")


def test_a_line_says_everything_that_is_known():
    line = plain(100, seconds_per_step=6)[1]
    assert line == "step 2/100  loss 5.0000  490k tokens/s  MFU 41.2%  ETA 9 min 48 s  9.60 GiB"


def test_what_is_not_known_is_left_out():
    stream = io.StringIO()
    with Progress(10, console=Console(file=stream)) as progress:
        progress.update(step=1, loss=3.0)
    assert stream.getvalue() == "step 1/10  loss 3.0000\n"


def test_validations_and_messages_stay_as_lines():
    stream = io.StringIO()
    with Progress(10, console=Console(file=stream, width=40)) as progress:
        progress.validation(5, 3.38211)
        progress.message("[red]brackets[/] are text, and a line longer than the terminal is not broken")
    assert stream.getvalue() == (
        "step 5/10  validation loss 3.3821\n"
        "[red]brackets[/] are text, and a line longer than the terminal is not broken\n"
    )


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb", "unknown", ""])
def test_a_terminal_of_any_kind_shows_the_last_state(kind):
    stream, time = io.StringIO(), Time()
    console = Console(file=stream, force_terminal=True, width=100, _environ={"TERM": kind})
    with Progress(10, console=console, now=time) as progress:
        for step in range(1, 11):
            time.seconds += 0.01
            progress.update(step=step, loss=1 / step)
        progress.message("done [x]")
    assert "step 10/10" in stream.getvalue()
    assert "done [x]" in stream.getvalue()


def test_a_live_display_draws_few_frames():
    class Counting(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            return super().write(text)

    stream, time = Counting(), Time()
    console = Console(file=stream, force_terminal=True, _environ={"TERM": "xterm"})
    with Progress(10_000, console=console, now=time) as progress:
        for step in range(1, 1001):
            time.seconds += 0.001
            progress.update(step=step)
    assert stream.writes < 60


class Broken(io.StringIO):
    """A stream that fails when it is written to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        ValueError("I/O operation on closed file"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
        OSError(5, "Input/output error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_display_that_cannot_write_never_stops_the_run(terminal, error):
    console = Display(file=Broken(error), force_terminal=terminal, _environ={"TERM": "xterm"})
    with Progress(3, console=console) as progress:
        for step in (1, 2, 3):
            progress.update(step=step, loss=1.0)
            progress.validation(step, 1.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_letters_that_the_terminal_lacks_are_replaced(terminal):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(3, console=Display(file=stream, force_terminal=terminal, width=80)) as progress:
        progress.update(step=1, loss=1.0)
        progress.message("naïve")
        progress.update(step=3, loss=1.0)
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "na?ve" in text
    assert "step 3/3" in text


def test_a_broken_display_gives_standard_output_back(capsys):
    console = Display(file=Broken(OSError(5, "Input/output error")), force_terminal=True)
    before = sys.stdout
    with Progress(3, console=console) as progress:
        progress.update(step=1)
        print("somebody else's line")
    assert sys.stdout is before
    assert "somebody else's line" in capsys.readouterr().out


def test_an_error_of_the_run_passes_through_the_display():
    def fail():
        with Progress(3, console=Console(file=io.StringIO(), force_terminal=True)) as progress:
            progress.update(step=1)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
