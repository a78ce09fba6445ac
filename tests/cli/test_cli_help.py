import re
import subprocess
import sys
import typing

import pytest

from sabrage.cli import Command, main


def commands(union, prefix=()):
    """(words, class) of every command and of every command below it."""
    for choice in typing.get_args(union):
        made, name = typing.get_args(choice)[0], choice.__metadata__[0].name
        yield (*prefix, name), made
        below = typing.get_type_hints(made, include_extras=True).get("command")
        if below is not None:
            yield from commands(typing.get_args(below)[0], (*prefix, name))


COMMANDS = [words for words, _ in commands(Command)]


def help_of(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_teaches_by_example(words, capsys):
    lines = help_of(words, capsys).splitlines()
    examples = lines[lines.index("Try:") + 1 :]
    assert examples[0].startswith("  sabrage " + " ".join(words))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_of_every_command_is_explained(words, capsys):
    # A box has an option's name in its left column and its words in the right one, or below.
    named = re.split(r"^\W+(--\w[\w-]*)", help_of(words, capsys), flags=re.MULTILINE)[1:]
    assert [name for name, text in zip(named[::2], named[1::2], strict=True) if len(text.split()) < 5] == []


def test_the_overview_names_every_command_and_the_first_steps(capsys):
    text = help_of([], capsys)
    assert [words[0] for words in COMMANDS if f"• {words[0]}" not in text] == []
    assert "sabrage doctor" in text
    assert "sabrage train demo" in text


def test_help_needs_neither_torch_nor_numpy():
    script = f"""
import contextlib, io, sys
from sabrage.cli import main
for words in {[[], *COMMANDS]!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--help"])
print([name for name in ("torch", "numpy", "jinja2", "tiktoken") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_switches_are_plain_flags(capsys):
    assert main(["show", "demo", "--json"]) == 0
    with pytest.raises(SystemExit) as end:
        main(["show", "demo", "--json", "True"])
    assert end.value.code == 2
