import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from sabrage.cli.data import Data, Embedded, Fineweb, Inspect, Text
from sabrage.data.shards import find_shards
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.parts import DataError


def parse(*words):
    return tyro.cli(Data, args=words).command


def run(*words):
    return tyro.cli(Data, args=words).run()


def test_fineweb_takes_shards_and_a_folder():
    assert parse("fineweb") == Fineweb(shards=26, out=Path("data/fineweb"))
    assert parse("fineweb", "--shards", "3", "--out", "x") == Fineweb(shards=3, out=Path("x"))


def test_the_default_number_of_shards_is_the_least_that_lasts_the_baseline():
    blocks_needed, blocks_of_a_shard = 4768 * 32, (100_000_000 - 1) // 16_384
    assert Fineweb.shards == -(-blocks_needed // blocks_of_a_shard)


def test_text_takes_any_number_of_paths_and_needs_a_folder():
    expected = Text(paths=(Path("a.txt"), Path("b")), out=Path("x"), ranks=Path("r"), field="body", workers=2)
    flags = ("--out", "x", "--ranks", "r", "--field", "body", "--workers", "2")
    assert parse("text", "a.txt", "b", *flags) == expected
    with pytest.raises(SystemExit):
        parse("text", "a.txt")


def test_inspect_takes_one_path():
    assert parse("inspect", "x", "--sample-tokens", "5") == Inspect(path=Path("x"), sample_tokens=5)


def test_embedded_needs_nothing():
    assert parse("embedded") == Embedded()


@pytest.mark.parametrize("command", ["fineweb", "text", "inspect", "embedded"])
def test_help_teaches_with_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(command, "--help")
    assert caught.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line for line in lines if line.startswith("sabrage data ")]
    assert examples
    for example in examples:
        parse(*example.split()[2:])


def test_it_nests_under_the_whole_command():
    args = ["data", "fineweb", "--shards", "2"]
    nested = tyro.extras.subcommand_cli_from_dict({"data": Data, "other": Embedded}, args=args)
    assert nested.command == Fineweb(shards=2)


def test_help_waits_for_no_heavy_import():
    code = "import sys, sabrage.cli.data; sys.exit(bool({'torch', 'tiktoken', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fineweb_fetches_and_says_where(monkeypatch, tmp_path, capsys):
    calls = []

    def fetch(folder, *, num_shards):
        calls.append((folder, num_shards))
        return [folder] * (num_shards + 1)

    monkeypatch.setattr("sabrage.data.fineweb.fetch", fetch)
    assert run("fineweb", "--shards", "2", "--out", str(tmp_path)) == 0
    assert calls == [(tmp_path, 2)]
    assert "3 shards" in capsys.readouterr().out


def test_text_and_then_inspect(monkeypatch, tmp_path, capsys):
    class Bytes(ByteTokenizer):
        def __init__(self, ranks=None):
            self.ranks = ranks

    monkeypatch.setattr("sabrage.data.tokenizer.GPT2Tokenizer", Bytes)
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text(f"this is text number {index}")
    out = tmp_path / "out"
    assert run("text", str(tmp_path), "--out", str(out), "--workers", "1") == 0
    assert "5 documents" in capsys.readouterr().out
    find_shards(out)
    assert run("inspect", str(out)) == 0
    assert "this is text number" in capsys.readouterr().out


def test_embedded_builds_and_describes(monkeypatch, tmp_path, capsys):
    library = tmp_path / "library"
    library.mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    assert run("embedded", "--out", str(tmp_path / "cache")) == 0
    assert "unigram entropy" in capsys.readouterr().out


def test_an_error_reaches_the_caller_with_its_remedy(tmp_path):
    with pytest.raises(DataError, match="no such rank file"):
        run("inspect", str(tmp_path), "--ranks", str(tmp_path / "absent"))
