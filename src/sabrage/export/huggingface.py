"""A run as a folder that `transformers` loads: weights, config, tokenizer and the file with the model class.

The weights are fp32 under `model.`, a table that is tied saved once; see `modeling_sabrage.py`.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from sabrage.config import ConfigError, leaves, to_json
from sabrage.data.tokenizer import END_OF_TEXT
from sabrage.export.tokenizer import library_tokenizer
from sabrage.model.lm import LM
from sabrage.parts import Tokenizer
from sabrage.recipe import Recipe
from sabrage.run.folder import write_json
from sabrage.run.manifest import installed_version

MODELLING = "modeling_sabrage.py"


def export(recipe: Recipe, model: LM, folder: Path, *, tokenizer: Tokenizer | None) -> list[Path]:
    """Writes the folder, which must be new or empty, and returns its files. Raises ConfigError.

    Without a tokenizer the folder has none, and no token ends a text by itself.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; choose another one")
    library = library_tokenizer(tokenizer) if tokenizer else None
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if recipe.model.head.tied:
        del state["head.weight"]
    tensors = {f"model.{name}": tensor.float().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(Path(__file__).with_name(MODELLING), folder / MODELLING)
    ends = tokenizer.end_of_text if tokenizer else None
    tokens = {"bos_token_id": ends, "eos_token_id": ends, "pad_token_id": ends}
    write_json(folder / "config.json", config(recipe) | tokens)
    write_json(folder / "generation_config.json", {"use_cache": False, **tokens})
    if library is not None:
        library.save(str(folder / "tokenizer.json"))
        special = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad")}
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", **special}
        length = {"model_max_length": longest(recipe), "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", described | length)
    return sorted(folder.iterdir())


def config(recipe: Recipe) -> dict:
    """What config.json says of the model."""
    module = MODELLING.removesuffix(".py")
    return {
        "model_type": "sabrage",
        "architectures": ["SabrageForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.SabrageConfig",
            "AutoModelForCausalLM": f"{module}.SabrageForCausalLM",
        },
        "torch_dtype": "float32",
        "vocab_size": recipe.model.vocab_size,
        "hidden_size": recipe.model.dim,
        "num_hidden_layers": recipe.model.layers,
        "max_position_embeddings": longest(recipe),
        "tie_word_embeddings": recipe.model.head.tied,
        "use_cache": False,
        "sabrage_version": installed_version("sabrage"),
        "recipe": to_json(recipe),
    }


def longest(recipe: Recipe) -> int:
    """Positions that the model has, or else tokens in the rows that it was validated on."""
    limits = [value for path, value in leaves(recipe.model) if path.endswith(".max_length")]
    return min([value for value in limits if isinstance(value, int)], default=recipe.budget.evaluation_length)
