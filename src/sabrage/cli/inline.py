"""`python -m sabrage.cli.inline SOCKET`: what `sabrage train` does, for one job after another.

SOCKET is the number of an inherited socket, on which `sabrage.study.workplace.Kept` hands the jobs over. What
a person can mend fails a job alone, with a sentence. Any other error ends the process, with its traceback in
the job's output: nobody knows then in what state the device is.
"""

import json
import os
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sabrage.train.workshop import Shelf


def carry_out(words: list[str], shelf: "Shelf") -> int:
    """Runs one `sabrage train`, given by its words, and returns its exit code."""
    from sabrage.cli import parse
    from sabrage.train.loop import TrainingStopped

    # The manifest names the command that makes the same run by itself.
    sys.argv = ["sabrage", *words]
    try:
        return parse(words).run(shelf)
    except (ValueError, OSError) as error:
        # A loss that is no number says nothing against the workshop; any other error may have left it half
        # built.
        if not isinstance(error, TrainingStopped):
            shelf.clear()
        print(f"sabrage: {error}", file=sys.stderr)
        return 1


def print_to(output: int) -> None:
    """Makes an open file the one that this process prints to; it is closed with the next."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def serve(line: socket.socket) -> None:
    """Takes jobs until nobody is left who hands them over."""
    from sabrage.train.workshop import Shelf

    shelf, requests = Shelf(), line.makefile()
    while True:
        byte, files, *_ = socket.recv_fds(line, 1, 1)
        if not byte:
            return
        print_to(files[0])
        code = carry_out(json.loads(requests.readline()), shelf)
        # Closes the job's output, and so gives up its lock, before the answer.
        print_to(os.open(os.devnull, os.O_WRONLY))
        line.sendall(f"{code}\n".encode())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        inherited.set_inheritable(False)
        serve(inherited)
