"""A command of sabrage in a part of the GPU's memory, as on a smaller card.

    python -m sabrage.cli.capped GIB train fast-24gb ...

The allocator refuses more than GIB GiB, as it would where there is no more; a CUDA context takes some hundred
MiB beside it, so that a card of 24 GiB gives about 22. Speed stays that of this card. The device still tells
its whole memory, so a micro-batch that is derived from it is halved until it fits, as the run will say.
"""

import sys
from collections.abc import Sequence

import torch

from sabrage.cli import main
from sabrage.config import ConfigError

USAGE = "usage: python -m sabrage.cli.capped GIB COMMAND ..."


def cap(gib: float) -> None:
    """Lets this process allocate so many GiB of the current device. Raises ConfigError."""
    if not torch.cuda.is_available():
        raise ConfigError("a cap on GPU memory needs a CUDA device and torch sees none; check nvidia-smi")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if not 0 < gib * 2**30 <= total:
        raise ConfigError(
            f"got a cap of {gib:g} GiB, allowed: above 0, up to the {total / 2**30:.1f} there are"
        )
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def run(words: Sequence[str]) -> int:
    """Caps the memory and runs the command; 2 for wrong usage, else what the command answers."""
    number = words[0].replace(".", "", 1) if words else ""
    if len(words) < 2 or not number.isdecimal():
        print(USAGE, file=sys.stderr)
        return 2
    try:
        cap(float(words[0]))
    except ConfigError as error:
        print(f"sabrage: {error}", file=sys.stderr)
        return 1
    return main(words[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
