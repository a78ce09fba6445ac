"""Turns on a device that several processes share: while one of them trains, the others start and compile.

A study that runs more processes than there are GPUs names a file for each GPU in their environment. Who
trains holds that file's lock, which goes with the process however it ends. Starting and compiling leave a GPU
idle most of the time, so that the steps of who trains are timed nearly as if it were alone: what disturbs
them now and then does not move their median.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Names the file whose lock is the turn; unset: nobody waits.
TURN = "SABRAGE_TURN"


def turn_file(gpu: str) -> Path:
    """The file of this user's turns on a GPU, by its index or UUID: the same for every study."""
    return Path(tempfile.gettempdir()) / f"sabrage-{os.getuid()}-gpu-{gpu}.turn"


def shares_device() -> bool:
    """Whether this process waits for others, so that only the seconds of its training say something."""
    return bool(os.environ.get(TURN))


@contextmanager
def turn() -> Iterator[None]:
    """Waits until nobody else trains on this process's device, and keeps it meanwhile."""
    name = os.environ.get(TURN)
    if not name:
        yield
        return
    with open(name, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
