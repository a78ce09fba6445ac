"""`sabrage bench`: what kernels, training steps and the baseline take on this machine's GPU."""

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


@dataclass(frozen=True)
class Mla:
    """Check and time the paged latent decoding kernel on FlashMLA's grid of 32 runs.

    Latency, TFLOP/s and GB/s beside the device's own copy and product rates.

    Try:
      sabrage bench mla
      sabrage bench mla --small --out results/mla.json
      sabrage bench mla --tune
    """

    small: bool = False
    """Eight runs in a quarter of the memory."""
    tune: bool = False
    """Time other tiles on three telling runs instead."""
    out: Path | None = None
    """Write the result file here, and three charts (SVG) beside it."""

    def run(self) -> int:
        from sabrage.bench.mla import measure
        from sabrage.bench.mla_tune import tune

        if self.tune:
            tune(out=self.out)
        else:
            measure(small=self.small, out=self.out)
        return 0


def require_cuda() -> None:
    """Raises ConfigError where torch sees no CUDA device."""
    import torch

    from sabrage.config import ConfigError

    if not torch.cuda.is_available():
        raise ConfigError("benchmarks need a CUDA device and torch sees none; check nvidia-smi")


@dataclass(frozen=True)
class Bench:
    """Measure on this machine's GPU: kernels, the steps of recipes, decoding, or the baseline as a whole.

    Try:
      sabrage bench kernels
      sabrage bench step nocap base --out results/steps.json
      sabrage bench baseline --data data/stand-in --out results
    """

    command: Annotated[
        Annotated[Kernels, tyro.conf.subcommand("kernels")]
        | Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Baseline, tyro.conf.subcommand("baseline")]
        | Annotated[Mla, tyro.conf.subcommand("mla")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Runs the chosen measurement. Raises ValueError where there is no GPU for it."""
        return self.command.run()
