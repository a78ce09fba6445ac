"""Where the jobs of a study are worked on, one at a time: a process for each, or one kept for many."""

import json
import os
import select
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import IO, Protocol

# Takes jobs as `Kept` hands them over.
INLINE = (sys.executable, "-m", "sabrage.cli.inline")
SECONDS_TO_END = 10.0


class Work(Protocol):
    """A job that is worked on, seen as its process: `poll` gives the exit code once it is over."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


class Workplace(ABC):
    """Works on one job after another."""

    @abstractmethod
    def start(self, words: Sequence[str], output: IO[bytes]) -> Work:
        """Begins what `sabrage` with these words does, printing to `output`, which is locked meanwhile.

        Whoever works on it holds `output` open, and with it the lock, also when this process dies.
        """

    def close(self) -> None:
        """Ends what is left of the place; nothing is worked on."""
        return


class Fresh(Workplace):
    """A process of its own for every job: `program` and the words."""

    def __init__(self, program: Sequence[str], environment: dict[str, str]) -> None:
        self.program, self.environment = program, environment

    def start(self, words: Sequence[str], output: IO[bytes]) -> Work:
        return launched([*self.program, *words], output, self.environment)


class Kept(Workplace):
    """One process for many jobs, and a new one when it has died: `program` and the number of its socket.

    A job is sent as one byte that carries the open output, then its words as a line of JSON; the answer is
    the exit code on a line.
    """

    def __init__(self, program: Sequence[str], environment: dict[str, str]) -> None:
        self.program, self.environment = program, environment
        self.process: subprocess.Popen | None = None
        self.line: socket.socket | None = None

    def start(self, words: Sequence[str], output: IO[bytes]) -> Work:
        if self.process is None or self.line is None or self.process.poll() is not None:
            self.close()
            self.line, theirs = socket.socketpair()
            with theirs:
                command = [*self.program, str(theirs.fileno())]
                self.process = launched(command, output, self.environment, keep=[theirs.fileno()])
        task = Task(self.process, self.line)
        try:
            socket.send_fds(self.line, [b"+"], [output.fileno()])
            self.line.sendall(json.dumps(list(words)).encode() + b"\n")
        except ConnectionError:
            # It died this very moment, which the task will tell.
            pass
        return task

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        if self.process is not None:
            try:
                self.process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                # It has nothing to lose: no job is left.
                self.process.kill()
                self.process.wait()
        self.process = self.line = None


class Task:
    """A job in the hands of a kept process: over when it answers, or dies."""

    def __init__(self, process: subprocess.Popen, line: socket.socket) -> None:
        self.process, self.line = process, line
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None and select.select([self.line], [], [], 0)[0]:
            try:
                answer = self.line.recv(64)
            except ConnectionError:
                answer = b""
            self.code = int(answer) if answer else self.process.poll()
        return self.code

    def send_signal(self, sig: int, /) -> None:
        self.process.send_signal(sig)

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        return self.process.wait()


def launched(
    command: Sequence[str], output: IO[bytes], environment: dict[str, str], *, keep: Sequence[int] = ()
) -> subprocess.Popen:
    """The command, begun, with all that it prints going to `output`."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        # Ctrl-C at the terminal reaches this process alone, which passes it on once: a run that gets it
        # twice would end without saving.
        start_new_session=True,
        pass_fds=keep,
    )
