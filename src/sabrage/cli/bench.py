"""`sabrage bench`: what kernels, attention, steps, decoding and the baseline take on this machine."""

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
class Attention:
    """Time the attention backends, forward and backward, beside the rate of a large product.

    By mask (causal, window, documents), head width (64, 128) and length; a cell whose error is too large has
    no numbers. One length takes about a minute, all of them about six.

    Try:
      sabrage bench attention
      sabrage bench attention --full --out results/attention.json
    """

    full: bool = False
    """All lengths, 512 to 16,384; by default 2,048 alone."""
    out: Path | None = None
    """Write the result file here, and a chart (SVG) beside it."""

    def run(self) -> int:
        from sabrage.bench.attention import measure

        measure(full=self.full, out=self.out)
        return 0


@dataclass(frozen=True)
class Step:
    """Time a whole training step of recipes and its optimizer alone, on made-up tokens.

    Also tokens per second, MFU, peak memory and seconds to compile. A changed recipe is written
    RECIPE+a.b=c+d.e=f.

    Try:
      sabrage bench step base base-adamw --out results/steps.json
      sabrage bench step base base+model.layers=6 --out results/layers.json
    """

    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")]
    """Recipes, in the order of the table."""
    out: Path
    """Write the result file here; its name is the name of the result."""
    stages: bool = False
    """A row for every stage of a recipe's plan, in which batch, length and window may differ."""

    def run(self) -> int:
        from sabrage.bench.step import main
        from sabrage.bench.trial import asked
        from sabrage.config import ConfigError

        names = [asked(text).name for text in self.recipes]
        if not names:
            raise ConfigError("got no recipe to time; name at least one, such as base")
        require_cuda()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        stages = ["--stages"] if self.stages else []
        main([*names, "--out", str(self.out), "--name", self.out.stem, *stages])
        return 0


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a step goes: head, MLP, mixer and attention in it, optimizer, and the rest.

    Each region is timed alone, as it is in the step; also kernels launched, idle time, MFU and the floor. A
    changed recipe is written RECIPE+a.b=c+d.e=f. One to three minutes a recipe.

    Try:
      sabrage bench breakdown nocap base
      sabrage bench breakdown base base+model.head=FusedHead --out results/breakdown.json
      sabrage bench breakdown fast --kernels 40
    """

    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")]
    """Recipes, in the order of the table."""
    stage: int | None = None
    """Stage of the plan, counted from 0; by default the last."""
    kernels: int = 0
    """Also list the kernels of a step that take longest, so many of each recipe."""
    out: Path | None = None
    """Write the result file here, and a chart (SVG) beside it."""

    def run(self) -> int:
        from sabrage.bench.breakdown import measure

        measure(self.recipes, stage=self.stage, kernels=self.kernels, out=self.out)
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


@dataclass(frozen=True)
class Speculate:
    """Time plain and self-speculative decoding of a run whose objective has a drafting module.

    Drafts kept, tokens a pass of the model and the speed-up, greedy and at temperature 1.

    Try:
      sabrage bench speculate runs/mine --out results/speculation.json
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    out: Path
    """Write the result file here; its name is the name of the result."""
    data: Path | None = None
    """Folder of the data set, where it is not where the recipe says."""
    prompts: int = 8
    """How many stretches of the validation split to go on from."""
    max_tokens: int = 128
    """New tokens after each."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""

    def run(self) -> int:
        from sabrage.bench.speculate import measure
        from sabrage.cli.choose import model_of_run, named_device
        from sabrage.cli.console import say
        from sabrage.generate.speculate import load_drafter
        from sabrage.run.folder import RunFolder

        device = named_device(self.device)
        recipe, model = model_of_run(self.run_folder, device=device)
        checkpoints = RunFolder(self.run_folder).checkpoints
        drafter = load_drafter(recipe, checkpoints, device=device, warn=say)
        corpus, size = recipe.data.open(self.data), {"number": self.prompts, "max_tokens": self.max_tokens}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        measure(recipe, model, drafter, corpus, out=self.out, **size)
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
    """Measure on this machine: kernels, attention, steps of recipes, decoding, or the baseline as a whole.

    Try:
      sabrage bench kernels
      sabrage bench attention --out results/attention.json
      sabrage bench step nocap base --out results/steps.json
      sabrage bench breakdown nocap base
      sabrage bench decode base --out results/decode.json
      sabrage bench baseline --data data/stand-in --out results
    """

    command: Annotated[
        Annotated[Kernels, tyro.conf.subcommand("kernels")]
        | Annotated[Attention, tyro.conf.subcommand("attention")]
        | Annotated[Step, tyro.conf.subcommand("step")]
        | Annotated[Breakdown, tyro.conf.subcommand("breakdown")]
        | Annotated[Baseline, tyro.conf.subcommand("baseline")]
        | Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[Speculate, tyro.conf.subcommand("speculate")]
        | Annotated[Mla, tyro.conf.subcommand("mla")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Runs the chosen measurement. Raises ValueError where there is no GPU for it."""
        return self.command.run()
