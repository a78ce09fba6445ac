"""Text that every Python installation brings along: the help topics of `pydoc` and the prose docstrings of
the standard library, as bytes. It lets a run start with no download at all.

Its documents quote each other at length, so that a paragraph is left out when ten words in a row of it stand
in a longer document: what is held out is then new to the model, save for boiler-plate of a line or two.

The text differs between Python versions, so its sha256 is recorded and losses are never compared across
hashes. The unigram entropy of the training bytes, -sum p ln p nats, is the loss of a model that knows
frequencies only.
"""

import ast
import hashlib
import itertools
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sabrage.data.shards import open_shard, write_shard
from sabrage.data.stream import ShardStream
from sabrage.data.tokenizer import ByteTokenizer
from sabrage.parts import Corpus, DataError, DataSource
from sabrage.run.folder import write_json

# Raised whenever the choice of documents changes, so that an older cache is not taken for this one.
EDITION = 2
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
MIN_WORDS = 12
MIN_PROSE = 0.85
# About 64 bytes of English.
RUN_WORDS = 10
VALIDATION_PERCENT = 10


@dataclass(frozen=True, kw_only=True)
class EmbeddedText(DataSource):
    """About 1.6 million bytes of English prose from the Python installation itself, vocabulary 257."""

    block_tokens: int = 1024

    def problems(self) -> list[str]:
        if self.block_tokens < 1:
            return [f"data.block_tokens={self.block_tokens}, allowed: 1 or more; the default is 1024"]
        return []

    def open(self, folder: Path | None = None) -> Corpus:
        """Opens the text, built at the first call (seconds) and kept under `folder` (or `cache_folder()`).

        Raises DataError when a kept file is no longer what was written.
        """
        place = embedded_folder(folder)
        facts_path = place / "facts.json"
        if not facts_path.exists():
            build(place)
        facts = json.loads(facts_path.read_text())
        shards = {}
        for split in ("train", "val"):
            path = place / f"{split}.bin"
            shards[split] = open_shard(path, vocab_size=ByteTokenizer.vocab_size)
            if hash_of(shards[split]) != facts["sha256"][split]:
                raise DataError(f"{path}: changed since it was written; delete {place}, it is built again")
        return Corpus(
            track="embedded",
            train=ShardStream([shards["train"]], block_tokens=self.block_tokens, source=str(place)),
            validation=shards["val"],
            vocab_size=ByteTokenizer.vocab_size,
            tokenizer=ByteTokenizer(),
            fingerprint=facts,
            end_of_text=ByteTokenizer.end_of_text,
        )


def cache_folder() -> Path:
    """Where derived files are kept: `sabrage` under XDG_CACHE_HOME or, without it, under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sabrage"


def embedded_folder(folder: Path | None = None) -> Path:
    """Where the text of this Python lies, under `folder` or `cache_folder()`."""
    return (cache_folder() if folder is None else folder) / f"embedded-{EDITION}-{platform.python_version()}"


def build(place: Path) -> None:
    """Collects the documents and writes train.bin, val.bin and, last, facts.json."""
    sources = {
        "topics": list(topics()),
        "docstrings": list(docstrings(Path(sysconfig.get_paths()["stdlib"]))),
    }
    # In the order of their hashes every stretch of the text is a mixture of all of it.
    documents = sorted(without_repeats(itertools.chain(*sources.values())), key=digest_of)
    splits = {
        "train": [text for text in documents if not is_validation(text)],
        "val": [text for text in documents if is_validation(text)],
    }
    tokens = {split: encode_documents(texts) for split, texts in splits.items()}
    place.mkdir(parents=True, exist_ok=True)
    for split, array in tokens.items():
        write_shard(place / f"{split}.bin", array)
    facts = {
        "edition": EDITION,
        "python": platform.python_version(),
        "found": {source: len(texts) for source, texts in sources.items()},
        "documents": {split: len(texts) for split, texts in splits.items()},
        "tokens": {split: len(array) for split, array in tokens.items()},
        "sha256": {split: hash_of(array) for split, array in tokens.items()},
        "unigram_entropy": unigram_entropy(tokens["train"]),
    }
    write_json(place / "facts.json", facts)


def topics() -> Iterator[str]:
    """The texts of `help("TOPIC")`, by name; none where the system ships Python without them."""
    try:
        from pydoc_data.topics import topics as texts
    except ModuleNotFoundError:
        return
    for name in sorted(texts):
        yield texts[name].strip()


def docstrings(folder: Path) -> Iterator[str]:
    """Prose docstrings of the modules under `folder`, by path and place in the file; nothing is imported."""
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        if LEFT_OUT.intersection(path.relative_to(folder).parts):
            continue
        with warnings.catch_warnings():
            # Invalid escapes in other people's sources are no concern of ours.
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                # A file that this Python cannot parse, a template say, has no docstrings.
                continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, definitions) else None
            if text and is_prose(text):
                yield text.strip()


def is_prose(text: str) -> bool:
    """Sentences rather than tables, signatures or sessions: mostly letters, spaces and plain punctuation."""
    plain = sum(character.isalpha() or character in " \n.,'" for character in text)
    return len(text.split()) >= MIN_WORDS and plain >= MIN_PROSE * len(text) and ">>>" not in text


def without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """The documents, longest first, without the paragraphs that repeat a run of words of an earlier one.

    Paragraphs too short for a run stay; a document that keeps fewer than MIN_WORDS words goes.
    """
    seen: set[str] = set()
    for text in sorted(set(documents), key=lambda text: (-len(text), text)):
        paragraphs = [(paragraph, runs_of(paragraph)) for paragraph in re.split(r"\n\s*\n", text)]
        kept = [(paragraph, runs) for paragraph, runs in paragraphs if seen.isdisjoint(runs)]
        seen.update(*(runs for _, runs in kept))
        rest = "\n\n".join(paragraph for paragraph, _ in kept)
        if len(rest.split()) >= MIN_WORDS:
            yield rest


def runs_of(paragraph: str) -> set[str]:
    """Every RUN_WORDS words in a row, whatever the lines are broken at."""
    words = paragraph.split()
    return {" ".join(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)}


def is_validation(text: str) -> bool:
    """Whether a document is held out: about one in ten, by its own hash."""
    return int.from_bytes(digest_of(text), "big") % 100 < VALIDATION_PERCENT


def digest_of(text: str) -> bytes:
    """sha256 of a document."""
    return hashlib.sha256(text.encode()).digest()


def encode_documents(documents: list[str]) -> np.ndarray:
    """(N,) uint16: each document's bytes, an end of text before each."""
    tokenizer = ByteTokenizer()
    pieces = [
        np.array([tokenizer.end_of_text, *tokenizer.encode(text)], dtype=np.uint16) for text in documents
    ]
    return np.concatenate(pieces)


def hash_of(tokens: np.ndarray) -> str:
    """sha256 of the tokens as they lie in a shard."""
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, nats per token."""
    counts = np.bincount(tokens)
    frequencies = counts[counts > 0] / len(tokens)
    return float(-(frequencies * np.log(frequencies)).sum())
