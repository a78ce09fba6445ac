import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from sabrage.cli import main
from sabrage.config import override
from sabrage.context import Context
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.generate.cache import DenseCache
from sabrage.generate.engine import Engine
from sabrage.generate.sampling import Sampling, draw, probabilities
from sabrage.generate.text import generate, stream_text
from sabrage.model.lm import build_model

GREEDY = Sampling(temperature=0)
PROMPT = [256, 84, 104, 101, 32]


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Where the run that the tests of this file share is trained once."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(ready, tiny_options, tmp_path, monkeypatch, one_thread):
    """A folder with a trained run in `run`."""
    monkeypatch.chdir(tmp_path)
    if not ready.exists():
        assert main(["train", "demo", *tiny_options, "--out", str(ready)]) == 0
    shutil.copytree(ready, "run")


@pytest.fixture
def write(trained, capsys):
    """write(*options) -> what `sabrage generate run` prints."""
    capsys.readouterr()

    def text(*options):
        assert main(["generate", "run", "--device", "cpu", "--max-tokens", "60", *options]) == 0
        return capsys.readouterr().out

    return text


def test_the_seed_decides_the_text(write):
    texts = [write("--seed", seed, "--temperature", "1") for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_comes_first_and_the_text_is_new(write):
    text = write("--prompt", "The 5", "--max-tokens", "7")
    assert text.startswith("The 5")
    assert len(text.encode(errors="replace").rstrip(b"\n")) > len("The 5")


def test_greedy_and_top_1_write_the_same(write):
    greedy = write("--temperature", "0")
    assert write("--top-k", "1", "--seed", "5") == greedy
    assert write("--top-p", "0.000001", "--seed", "6") == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0, .*allowed: temperature >= 0$"),
        (["--top-p", "0"], "top_p=0.0, .*allowed: 0 < top_p <= 1$"),
        (["--max-tokens", "0"], "max_tokens=0, allowed: 1 or more"),
    ],
)
def test_impossible_options_are_refused(trained, capsys, options, message):
    assert main(["generate", "run", "--device", "cpu", *options]) == 1
    assert re.search(message, capsys.readouterr().err, flags=re.MULTILINE)


def test_prompts_of_a_file_are_printed_in_order_and_as_objects(trained, capsys, tmp_path):
    texts = ["The ", "A", "def "]
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
    options = ["generate", "run", "--device", "cpu", "--max-tokens", "9", "--rows", "2"]
    capsys.readouterr()
    assert main([*options, "--file", "prompts.jsonl"]) == 0
    dense = capsys.readouterr()
    assert main([*options, "--file", "prompts.jsonl", "--paged", "--json"]) == 0
    paged = capsys.readouterr()
    rows = sorted((json.loads(line) for line in paged.out.splitlines()), key=lambda row: row["index"])
    assert [row["prompt"] for row in rows] == texts
    assert dense.out == "\n".join(f"{row['prompt']}{row['text']}\n" for row in rows)
    assert [row["tokens"] for row in rows] == [9, 9, 9]
    for told in (dense, paged):
        assert re.fullmatch(
            r"27 tokens in [\d.]+ s, [\d.,]+ tokens/s; first token after [\d.]+ s; cache [\d.]+ KiB\n",
            told.err,
        )
    # A seed for each: the one prompt alone writes what it wrote in the file.
    assert main([*options, "--prompt", "A", "--seed", "1"]) == 0
    assert capsys.readouterr().out == f"A{rows[1]['text']}\n"


def test_in_bf16_the_cache_takes_half_the_memory(trained, capsys):
    told = []
    for dtype in ("auto", "fp32", "bf16"):
        capsys.readouterr()
        options = ["--device", "cpu", "--max-tokens", "5", "--dtype", dtype]
        assert main(["generate", "run", *options]) == 0
        told.append(float(re.search(r"cache ([\d.]+) KiB", capsys.readouterr().err)[1]))
    assert told == [told[0], told[0], told[0] / 2]


def test_stop_strings_end_the_text(write):
    text = write("--temperature", "0")
    stop = text[20:23]
    assert write("--temperature", "0", "--stop", "never", "--stop", stop) == text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--file", "b"], "got --prompt and --file; give one of them"),
        (["--rows", "0"], "got --rows 0, allowed: 1 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trained, capsys, options, message):
    assert main(["generate", "run", "--device", "cpu", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_fresh_process_knows_the_parts_of_a_run(trained):
    command = [sys.executable, "-m", "sabrage", "generate", "run", "--device", "cpu", "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[-1:]) == (0, "\n"), done.stderr


@pytest.fixture
def chat(trained, capsys, monkeypatch):
    """chat(lines, *options) -> what `sabrage chat run` prints when these lines are typed, then Ctrl-D."""
    capsys.readouterr()

    def talk(lines, *options):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        assert main(["chat", "run", "--device", "cpu", "--temperature", "0", *options]) == 0
        return capsys.readouterr()

    return talk


def test_a_chat_is_one_text_that_goes_on(chat, write):
    told = chat(["The ", "A", ""], "--max-tokens", "4", "--capacity", "90").out
    answers, text = told.split("\n"), ""
    assert answers[3:] == ["", ""]
    for line, answer in zip(["The ", "\nA", "\n"], answers, strict=False):
        text += line
        written = write("--prompt", text, "--temperature", "0", "--max-tokens", "4")
        assert written == f"{text}{answer}\n"
        text += answer


def test_a_text_that_is_full_gives_way_to_a_new_one(chat):
    told = chat(["The ", "The ", "a" * 50], "--max-tokens", "20", "--capacity", "32")
    assert "[the text is full at 32 tokens; a new one begins]" in told.err
    assert "[a line of 51 tokens is longer than the text may become]" in told.err


def test_ctrl_c_stops_the_turn_and_not_the_chat(chat, monkeypatch):
    steps = []

    def counted(engine, step=Engine.step):
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    told = chat(["The ", KeyboardInterrupt, "And "], "--max-tokens", "8", "--capacity", "90")
    assert re.findall(r"\[(\d+) tokens", told.err) == ["3", "8"]


@pytest.fixture
def fresh(tiny, one_thread):
    """The tiny model with weights large enough that its choices differ."""
    model = build_model(tiny.model, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@torch.no_grad()
def test_cached_decoding_takes_the_tokens_of_the_full_forward_pass(fresh):
    expected = list(PROMPT)
    for _ in range(40):
        expected.append(int(fresh.logits(torch.tensor([expected]))[0, -1].argmax()))
    found = list(generate(fresh, PROMPT, max_tokens=40, sampling=GREEDY))
    assert found == expected[len(PROMPT) :]
    assert len(set(found)) > 5


def test_decoding_stops_at_the_end_of_text(fresh):
    tokens = list(generate(fresh, PROMPT, max_tokens=40, sampling=GREEDY))
    end = tokens[7]
    stopped = list(generate(fresh, PROMPT, max_tokens=40, sampling=GREEDY, end_of_text=end))
    assert stopped == tokens[: tokens.index(end)]


def test_tokens_are_yielded_as_soon_as_they_are_known(fresh):
    calls = []
    fresh.head.register_forward_hook(lambda *_: calls.append(1))
    tokens = generate(fresh, PROMPT, max_tokens=40, sampling=GREEDY)
    for count in (1, 2, 3):
        next(tokens)
        assert len(calls) == count


def test_a_prompt_without_tokens_is_refused(fresh):
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        next(generate(fresh, [], max_tokens=1, sampling=GREEDY))


@pytest.mark.parametrize(("prompt", "max_tokens", "allowed"), [(5, 9, 8), (13, 1, 0), (30, 1, 0)])
def test_more_tokens_than_there_are_positions_are_refused_before_the_first(tiny, prompt, max_tokens, allowed):
    model = build_model(override(tiny.model, "mixers.0.rotary.max_length=12"), seed=1).eval()
    tokens = generate(model, [65] * prompt, max_tokens=max_tokens, sampling=GREEDY)
    with pytest.raises(ValueError, match=rf"allowed: {allowed} after a prompt .*rotary\.max_length=12"):
        next(tokens)


def test_every_position_that_there_is_can_be_used(tiny):
    model = build_model(override(tiny.model, "mixers.0.rotary.max_length=12"), seed=1).eval()
    assert len(list(generate(model, [65] * 5, max_tokens=8, sampling=GREEDY))) == 8


def test_the_cache_holds_what_the_streams_declare_and_refuses_more(tiny):
    cache = DenseCache(tiny.model, batch=3, capacity=5)
    assert cache.bytes() == 2 * 3 * 5 * (32 + 32) * 4
    entries = torch.zeros(3, 4, 32)
    cache.extend(0, key=entries, value=entries)
    cache.advance(4)
    with pytest.raises(ValueError, match="holds 5 tokens and 8 were needed"):
        cache.extend(0, key=entries, value=entries)


@torch.no_grad()
def test_a_cache_that_was_rewound_goes_on_as_if_the_forgotten_had_never_been(fresh):
    cache = DenseCache(fresh.spec, batch=1, capacity=16)

    def read(tokens):
        positions_BT = torch.arange(cache.length, cache.length + len(tokens))[None]
        logits_BTV = fresh.logits(torch.tensor([tokens]), Context(positions_BT=positions_BT, cache=cache))
        cache.advance(len(tokens))
        return logits_BTV

    read(PROMPT)
    straight = read([65, 66])
    cache.rewind(len(PROMPT))
    read([90, 91, 92])
    cache.rewind(len(PROMPT))
    assert torch.equal(read([65, 66]), straight)


def test_characters_of_several_bytes_are_streamed_whole():
    text = "naïve café, 12 €, 𝄞 and 日本"
    pieces = list(stream_text(iter(ByteTokenizer().encode(text)), ByteTokenizer()))
    assert pieces == list(text)


def test_a_character_cut_short_is_marked_and_does_not_swallow_the_next():
    tokenizer = ByteTokenizer()
    cut = [*"€".encode()[:2], *b"a", *"𝄞".encode()[:3]]
    assert "".join(stream_text(iter(cut), tokenizer)) == "\ufffda\ufffd"


def test_the_end_of_text_inside_a_stream_is_spelled_out():
    assert "".join(stream_text(iter([65, 256, 66]), ByteTokenizer())) == "A<|endoftext|>B"


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])


def test_temperature_divides_the_logits():
    found = probabilities(LOGITS, Sampling(temperature=0.5))
    torch.testing.assert_close(found, (LOGITS * 2).softmax(-1))


def test_top_k_keeps_the_likeliest_and_their_proportions():
    found = probabilities(LOGITS, Sampling(top_k=2))
    torch.testing.assert_close(found[:, :2], LOGITS[:, :2].softmax(-1))
    assert found[:, 2:].tolist() == [[0.0, 0.0, 0.0]]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    plain = LOGITS.softmax(-1)
    for kept in (1, 2, 3, 4):
        within = plain[0, :kept].sum().item()
        found = probabilities(LOGITS, Sampling(top_p=within - 1e-4))
        assert (found > 0).sum() == kept
        torch.testing.assert_close(found[0, :kept], plain[0, :kept] / within)


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    drawn = draw(LOGITS.expand(20_000, -1), Sampling(), generator)
    shares = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(shares, LOGITS.softmax(-1)[0], rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json",), "writes one text"),
        (("--repetition-penalty", "1.2"), "writes one text"),
        ((), "a module that drafts"),
    ],
)
def test_speculation_is_refused_where_it_cannot_be(trained, capsys, options, message):
    assert main(["generate", "run", "--device", "cpu", "--speculate", *options]) == 1
    assert message in capsys.readouterr().err
