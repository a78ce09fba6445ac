"""The command line: `sabrage COMMAND`. Each command is a dataclass whose fields are its options."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from sabrage.cli.bench import Bench
from sabrage.cli.chat import Chat
from sabrage.cli.check import Check
from sabrage.cli.data import Data
from sabrage.cli.describe import Doctor, List, Show
from sabrage.cli.evaluate import Eval
from sabrage.cli.experts import Experts
from sabrage.cli.export import Export
from sabrage.cli.generate import Generate
from sabrage.cli.report import Report, Watch
from sabrage.cli.study import Study
from sabrage.cli.submit import Submit
from sabrage.cli.sweep import Sweep
from sabrage.cli.train import Train

DESCRIPTION = """Train GPT-2-class language models to a target loss on one GPU, and prove what helped.

First steps: `sabrage doctor` looks at your machine, `sabrage list` names the recipes, `sabrage train demo`
trains a small one on any CPU. Every command has --help with examples.
"""

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Submit, tyro.conf.subcommand("submit")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Experts, tyro.conf.subcommand("experts")]
    | Annotated[Watch, tyro.conf.subcommand("watch")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The command that the arguments ask for, not yet run; wrong usage ends the process with status 2."""
    return tyro.cli(
        Command,
        prog="sabrage",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 for what could not be done, 130 after Ctrl-C, 143 after SIGTERM.

    Errors that a user can mend are ValueErrors: they are printed as a sentence, without a traceback.
    """
    command = parse(arguments)
    try:
        return command.run()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"sabrage: {error}", file=sys.stderr)
        return 1
