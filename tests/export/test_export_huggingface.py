import json
from dataclasses import replace

import pytest
import torch

from sabrage.cli import main
from sabrage.config import ConfigError, override, to_json
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.export.huggingface import export
from sabrage.generate.sampling import Sampling
from sabrage.generate.text import generate, load_model
from sabrage.model.lm import build_model
from sabrage.run.folder import RunFolder

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
TOKENS_BT = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
PROMPT = [256, *b"The "]


@pytest.fixture(autouse=True)
def quiet_library(tmp_path, monkeypatch):
    """The library copies modelling files to a cache, and shows bars."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    transformers.utils.logging.disable_progress_bar()


def noisy(recipe):
    """The recipe's model with noise on every weight."""
    model = build_model(recipe.model, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
    return model


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def exported(tiny, tmp_path, one_thread):
    """Our model and the folder of its export."""
    model = noisy(tiny)
    export(tiny, model, tmp_path / "export", tokenizer=ByteTokenizer())
    return model, tmp_path / "export"


VARIANTS = {
    "tied": [],
    "untied": ["model.head.tied=false"],
    "smeared": ["model.embedding=Smear"],
    "normed and squared": ["model.mixers.0.qk_norm=true", "model.feedforwards.0.activation=relu_squared"],
    "all of attention": [
        f"model.mixers.0.{change}"
        for change in (
            "gate=true",
            "exclusive_self=true",
            "paired=true",
            "rotary.share=0.5",
            "key_offset=true",
            "scale=0.4",
        )
    ],
    "copying": ["model.last=Copying", "model.last.head_width=16"],
    "fused": ["model.head=FusedHead", "model.wiring=FusedResidual", "model.head.softcap=15"],
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_library_computes_our_logits(tiny, tmp_path, changes, one_thread):
    for change in changes:
        tiny = override(tiny, change)
    model = noisy(tiny)
    export(tiny, model, tmp_path / "export", tokenizer=None)
    found = loaded(tmp_path / "export")(TOKENS_BT).logits
    torch.testing.assert_close(found, model.logits(TOKENS_BT), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_librarys_loss_is_ours(exported):
    model, folder = exported
    output = loaded(folder)(TOKENS_BT, labels=TOKENS_BT)
    expected = model.head.loss(model(TOKENS_BT[:, :-1]), TOKENS_BT[:, 1:])
    torch.testing.assert_close(output.loss, expected)


def test_greedy_generation_is_ours(exported):
    model, folder = exported
    expected = list(generate(model, PROMPT, max_tokens=20, sampling=Sampling(temperature=0)))
    found = loaded(folder).generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert found[0, len(PROMPT) :].tolist() == expected


@torch.no_grad()
def test_what_the_library_saves_again_it_loads_again(exported, tmp_path):
    model, folder = exported
    loaded(folder).save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    torch.testing.assert_close(again(TOKENS_BT).logits, model.logits(TOKENS_BT), rtol=0, atol=1e-4)
    assert again.model.head.weight is again.model.embedding.weight


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused(exported):
    model, folder = exported
    mask_BT = torch.ones_like(TOKENS_BT)
    mask_BT[0, 30:] = 0
    theirs = loaded(folder)
    found = theirs(TOKENS_BT, attention_mask=mask_BT).logits[0, :30]
    torch.testing.assert_close(found, model.logits(TOKENS_BT[:1, :30])[0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="text after padding"):
        theirs(TOKENS_BT, attention_mask=mask_BT.flip(1))


def test_the_tokenizer_comes_along(exported):
    _, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "naïve <3"
    assert tokenizer(text)["input_ids"] == ByteTokenizer().encode(text)
    assert tokenizer.decode(ByteTokenizer().encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token) == (256, "<|endoftext|>")


def test_the_config_holds_the_recipe_and_the_weights_no_table_twice(exported, tiny):
    from safetensors import safe_open

    _, folder = exported
    held = json.loads((folder / "config.json").read_text())
    assert held["recipe"] == to_json(tiny)
    assert (held["vocab_size"], held["max_position_embeddings"]) == (257, 16384)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embedding.weight" in names
    assert "model.head.weight" not in names


def test_a_folder_in_use_is_refused(exported, tiny):
    model, folder = exported
    with pytest.raises(ConfigError, match="not an empty folder; choose another"):
        export(tiny, model, folder, tokenizer=None)


def test_the_command_exports_the_newest_checkpoint(tiny_options, tmp_path, monkeypatch, one_thread, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", *tiny_options, "--out", "run"]) == 0
    assert main(["export", "run", "--to", "hf", "out"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    from sabrage.cli.choose import recipe_of_run

    model = load_model(
        recipe_of_run(tmp_path / "run"),
        RunFolder(tmp_path / "run").checkpoints,
        device=torch.device("cpu"),
        warn=print,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            loaded("out")(TOKENS_BT).logits, model.logits(TOKENS_BT), rtol=0, atol=1e-4
        )
    assert main(["export", "run", "out"]) == 1
    assert "choose another one" in capsys.readouterr().err


def test_a_vocabulary_of_its_own_is_exported_without_a_tokenizer(tiny, run_recipe, tmp_path, capsys):
    run_recipe(replace(tiny, model=replace(tiny.model, vocab_size=300)))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()
