import json

import pytest

from sabrage.run.log import Log, LogError, read_log


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write("train", step=0, loss=10.5)
        assert read_log(tmp_path / "log.jsonl") == [{"event": "train", "step": 0, "loss": 10.5}]


def test_opening_again_appends(tmp_path):
    for step in range(2):
        with Log(tmp_path / "log.jsonl") as log:
            log.write("train", step=step)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [0, 1]


def test_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "train", "step": 0}\n{"event": "train", "st')
    assert [record["step"] for record in read_log(path)] == [0]


def test_what_follows_a_half_written_line_is_not_merged_into_it(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "train", "step": 0}\n{"event": "train", "st')
    with Log(path) as log:
        log.write("train", step=1)
    assert [record["step"] for record in read_log(path)] == [0, 1]


def test_a_damaged_line_within_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "train", "step": 0}\nnonsense\n{"event": "train", "step": 1}\n')
    with pytest.raises(LogError, match="line 2: not JSON"):
        read_log(path)


def test_after_a_resume_each_step_is_seen_once_with_its_newest_loss(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        for step in range(5):
            log.write("train", step=step, loss="first")
        log.write("resume", step=3)
        for step in range(3, 6):
            log.write("train", step=step, loss="second")
    train = [record for record in read_log(tmp_path / "log.jsonl") if record["event"] == "train"]
    assert [(record["step"], record["loss"]) for record in train] == [
        (0, "first"), (1, "first"), (2, "first"), (3, "second"), (4, "second"), (5, "second"),
    ]  # fmt: skip


def test_a_second_resume_from_further_back_wins(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        for start in (0, 4, 2):
            if start:
                log.write("resume", step=start)
            for step in range(start, 6):
                log.write("train", step=step, loss=start)
    train = [record for record in read_log(tmp_path / "log.jsonl") if record["event"] == "train"]
    assert [(record["step"], record["loss"]) for record in train] == [
        (0, 0),
        (1, 0),
        (2, 2),
        (3, 2),
        (4, 2),
        (5, 2),
    ]


def test_the_validation_of_the_resumed_state_stays_and_later_ones_go(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        for step in (2, 4, 6):
            log.write("validation", step=step, loss=step)
        log.write("resume", step=4)
    validations = [record for record in read_log(tmp_path / "log.jsonl") if record["event"] == "validation"]
    assert [record["step"] for record in validations] == [2, 4]


def test_a_repeated_validation_replaces_the_earlier_one(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write("validation", step=2, loss=1.0)
        log.write("validation", step=2, loss=2.0)
    assert [record["loss"] for record in read_log(tmp_path / "log.jsonl")] == [2.0]


def test_numbers_that_are_not_finite_stay_strict_json_and_readable_as_numbers(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write("train", step=0, loss=float("nan"), parts=[float("inf"), 1.0])
    text = (tmp_path / "log.jsonl").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["parts"] == ["inf", 1.0]
    assert str(float(record["loss"])) == "nan"


def test_each_record_is_one_write(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl")
    written = []

    class File:
        def write(self, data):
            written.append(data)
            return len(data)

    log.close()
    log._file = File()
    log.write("train", step=0, text="x" * 100_000)
    assert len(written) == 1
    assert written[0].endswith(b"\n")


def test_a_record_written_only_in_part_is_an_error(tmp_path):
    log = Log(tmp_path / "log.jsonl")

    class Full:
        def write(self, data):
            return len(data) - 1

    log.close()
    log._file = Full()
    with pytest.raises(OSError, match="only in part"):
        log.write("train", step=0)
