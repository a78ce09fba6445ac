"""From what the user typed to things: devices, data folders, tokenizers and the recipe of an earlier run."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from sabrage.config import ConfigError, from_json, leaves, override
from sabrage.model.lm import LM
from sabrage.parts import Tokenizer
from sabrage.recipe import Recipe
from sabrage.run.device import choose_device, probe
from sabrage.run.folder import RunFolder, read_run


def named_device(name: str) -> torch.device:
    """The device of that name. Raises ConfigError for a name that torch does not know or a card not there."""
    try:
        device = choose_device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; allowed: auto, cpu, cuda, cuda:1, mps") from error
    cards = torch.cuda.device_count()
    if device.type == "cuda" and cards and (device.index or 0) >= cards:
        raise ConfigError(f"device {name!r} is not there; this machine has cuda:0 to cuda:{cards - 1}")
    return device


def recipe_of_run(path: Path) -> Recipe:
    """The recipe that the manifest of a run folder holds."""
    # A manifest names its parts, and only a part that was imported has a name.
    import sabrage.recipes  # noqa: F401

    recipe = from_json(json.loads(RunFolder(path).manifest.read_text())["recipe"], Recipe)
    assert isinstance(recipe, Recipe)
    return recipe


def newest_run(recipe: str, *, root: Path = Path("runs")) -> RunFolder:
    """The run of this recipe in `root` that was started last. Raises ConfigError when there is none."""
    manifests = {path.parent: json.loads(path.read_text()) for path in root.glob("*/manifest.json")}
    started = {path: made["started"] for path, made in manifests.items() if made["recipe"]["name"] == recipe}
    if not started:
        raise ConfigError(f"no run of {recipe!r} in {root}/ to resume; name its folder with --out")
    return RunFolder(max(started, key=lambda path: (started[path], path)))


def model_of_run(path: Path, *, device: torch.device, sets: Iterable[str] = ()) -> tuple[Recipe, LM]:
    """The recipe of a run, with assignments applied, and the model of its newest good checkpoint."""
    from sabrage.cli.console import say
    from sabrage.generate.text import load_model

    folder = RunFolder(path)
    read_run(path)
    recipe = recipe_of_run(path)
    for assignment in sets:
        recipe = override(recipe, assignment)
    return recipe, load_model(recipe, folder.checkpoints, device=device, warn=say)


def generating_model(path: Path, *, device: str, dtype: str) -> tuple[Recipe, LM]:
    """The recipe and the model of a run, in the format to write text in: auto, fp32 or bf16."""
    from sabrage.generate.text import narrow

    place = named_device(device)
    recipe, model = model_of_run(path, device=place)
    if dtype == "auto":
        narrower = place.type == "cuda" and probe(place).has_bf16 and not recipe.precision.wide()
        dtype = "bf16" if narrower else "fp32"
    return recipe, narrow(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def data_folder(recipe: Recipe) -> str | None:
    """The folder that the recipe reads, or None when it brings its own text."""
    path = dict(leaves(recipe.data)).get("path")
    return path if isinstance(path, str) else None


def tokenizer_of(recipe: Recipe, *, ranks: Path | None = None) -> Tokenizer:
    """The tokenizer that the recipe's vocabulary belongs to. Raises ConfigError when it has none."""
    from sabrage.data.tokenizer import ByteTokenizer, GPT2Tokenizer, folder_tokenizer

    if recipe.model.vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    if recipe.model.vocab_size != GPT2Tokenizer.vocab_size:
        raise ConfigError(f"a vocabulary of {recipe.model.vocab_size} tokens has no known tokenizer")
    if ranks is not None:
        return GPT2Tokenizer(ranks)
    return folder_tokenizer(Path(data_folder(recipe) or "."))
