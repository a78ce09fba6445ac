"""`sabrage bench`: what kernels, steps in training and decoding, and the baseline take on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Kernels:
    """Time the Triton operations beside torch eager, torch.compile and the device's ceiling.

    Forward and backward in bf16; a case that fails its error gate has no numbers.

    Try:
      sabrage bench kernels
      sabrage bench kernels rotary_norm --out results/rotary_norm.json
    """

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """One operation; by default all of them."""
    out: Path | None = None
    """Write the result file here, and a chart (SVG) beside it."""

    def run(self) -> int:
        from sabrage.bench.kernels import measure

        measure(self.name, out=self.out)
        return 0


@dataclass(frozen=True)
class Step:
    """Time a whole training step of recipes and its optimizer alone, on made-up tokens.

    Also tokens per second, MFU, peak memory and seconds to compile.

    Try:
      sabrage bench step base base-adamw --out results/steps.json
    """

    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")]
    """Recipes, in the order of the table."""
    out: Path
    """Write the result file here; its name is the name of the result."""

    def run(self) -> int:
        from sabrage.bench.step import main
        from sabrage.config import ConfigError
        from sabrage.recipes import find

        names = [find(name).name for name in self.recipes]
        if not names:
            raise ConfigError("got no recipe to time; name at least one, such as base")
        require_cuda()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        main([*names, "--out", str(self.out), "--name", self.out.stem])
        return 0


@dataclass(frozen=True)
class Decode:
    """Time the writing of text: tokens per second against batch and length, dense and paged cache.

    Random weights; bf16 on a GPU, where a step is a CUDA graph, and fp32 elsewhere.

    Try:
      sabrage bench decode
      sabrage bench decode base --batches 1 --lengths 1024 8192 --out results/decode.json
      sabrage bench decode demo --batches 1 4 --lengths 128 --device cpu
    """

    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RECIPE...]")] = (
        "base",
    )
    """Recipes, in the order of the table."""
    batches: tuple[int, ...] = (1, 16, 64)
    """How many sequences are written at once."""
    lengths: tuple[int, ...] = (1024, 8192)
    """How many tokens each of them has."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path | None = None
    """Write the result file here, and a chart (SVG) beside it."""

    def run(self) -> int:
        from sabrage.bench.decode import measure
        from sabrage.cli.choose import named_device
        from sabrage.recipes import find

        recipes = [find(name) for name in self.recipes]
        device = named_device(self.device)
        measure(recipes, batches=self.batches, lengths=self.lengths, device=device, out=self.out)
        return 0


@dataclass(frozen=True)
class Baseline:
    """Train `nocap-mini` to its end from a cold start, then a few steps from a warm one.

    The three clocks, speed, memory, both starts and the validation curve, as result files.

    Try:
      sabrage bench baseline --data data/stand-in --out results
    """

    data: Path
    """Folder of the shards of the stand-in track."""
    out: Path
    """Folder for the two runs and the result files."""

    def run(self) -> int:
        from sabrage.bench.nocap_mini import measure

        require_cuda()
        self.out.mkdir(parents=True, exist_ok=True)
        measure(self.data, self.out, options=[], commit=None)
        return 0


def require_cuda() -> None:
    """Raises ConfigError where torch sees no CUDA device."""
    import torch

    from sabrage.config import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError("benchmarks need a CUDA device and torch sees none; check nvidia-smi")


@dataclass(frozen=True)
class Bench:
    """Measure on this machine: kernels, the steps of recipes, decoding, or the baseline as a whole.

    Try:
      sabrage bench kernels
      sabrage bench step nocap base --out results/steps.json
      sabrage bench decode base --out results/decode.json
      sabrage bench baseline --data data/stand-in --out results
    """

    command: Annotated[
        Annotated[Kernels, tyro.conf.subcommand("kernels")]
        | Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[Baseline, tyro.conf.subcommand("baseline")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Runs the chosen measurement. Raises ValueError where there is no GPU for it."""
        return self.command.run()
