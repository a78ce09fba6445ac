"""`sabrage data`: fetch FineWeb, encode one's own text, look into shards, build the embedded text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Fineweb:
    """Fetch the benchmark's FineWeb shards (GPT-2 tokens, 100M and 200 MB each) from the Hugging Face hub.

    What is there already and whole is kept; a run that was cut off goes on where it stopped.

    Try:
      sabrage data fineweb
      sabrage data fineweb --shards 3 --out /disk/fineweb
    """

    shards: int = 26
    """Training shards, 1 to 50; 26 last the `nocap` recipe (4,768 x 524,288 tokens) without a repeat."""
    out: Path = Path("data/fineweb")
    """Folder that receives the shards."""

    def run(self) -> int:
        from sabrage.data.fineweb import fetch

        paths = fetch(self.out, num_shards=self.shards)
        print(f"{len(paths)} shards in {self.out}; look inside with: sabrage data inspect {self.out}")
        return 0


@dataclass(frozen=True)
class Text:
    """Encode your own text to GPT-2 token shards that any recipe can train on.

    Reads .txt files (one document each), .jsonl (one document a line), .parquet (one document a row) and
    folders of them. Documents are held out for validation by their own hash; a single document has its
    tail held out.

    Try:
      sabrage data text book.txt --out data/book
      sabrage data text articles/ more.jsonl --field body --out data/articles
      sabrage data text notes/ --out data/notes --ranks gpt2.tiktoken
    """

    paths: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="PATH...", help_behavior_hint="(one or more)"),
    ]
    """Files and folders to read."""
    out: Path
    """New folder that receives train_*.bin and val_*.bin."""
    ranks: Path | None = None
    """GPT-2 rank file (gpt2.tiktoken), for machines without a network; copied into the folder."""
    field: str = "text"
    """Name of the text in .jsonl lines and .parquet columns."""
    validation_fraction: float = 0.01
    """Share of the documents held out, 0 to below 1."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard."""
    workers: int | None = None
    """Processes that tokenise; one for each core unless given."""

    def run(self) -> int:
        from sabrage.data.text import encode_text
        from sabrage.data.tokenizer import GPT2Tokenizer

        done = encode_text(
            self.paths,
            self.out,
            tokenizer=GPT2Tokenizer(self.ranks),
            field=self.field,
            validation_fraction=self.validation_fraction,
            shard_tokens=self.shard_tokens,
            num_workers=self.workers,
        )
        print(
            f"{done.documents:,} documents in {self.out}: {done.train_tokens:,} training and "
            f"{done.validation_tokens:,} validation tokens; look inside with: sabrage data inspect {self.out}"
        )
        return 0


@dataclass(frozen=True)
class Inspect:
    """Show what is in a shard or a folder of shards: tokens, documents, their lengths, some text.

    Try:
      sabrage data inspect data/fineweb
      sabrage data inspect data/book/val_000000.bin --sample-tokens 500
    """

    path: tyro.conf.Positional[Path]
    """A .bin file, or a folder of them."""
    ranks: Path | None = None
    """GPT-2 rank file; without one, gpt2.tiktoken of the same folder, or a download."""
    sample_tokens: int = 200
    """Tokens of the first shard to show as text."""

    def run(self) -> int:
        from rich.console import Console

        from sabrage.data.inspect import inspect_shards, render
        from sabrage.data.tokenizer import GPT2Tokenizer, folder_tokenizer

        folder = self.path if self.path.is_dir() else self.path.parent
        tokenizer = GPT2Tokenizer(self.ranks) if self.ranks else folder_tokenizer(folder)
        found = inspect_shards(self.path, tokenizer=tokenizer, num_sample_tokens=self.sample_tokens)
        Console().print(render(found))
        return 0


@dataclass(frozen=True)
class Embedded:
    """Build and describe the embedded text: prose that every Python installation brings along, as bytes.

    It needs no download; training on it shows that everything works, and its losses are their own track.

    Try:
      sabrage data embedded
    """

    out: Path | None = None
    """Folder for the built text; the cache folder (~/.cache/sabrage) unless given."""

    def run(self) -> int:
        from rich.console import Console

        from sabrage.data.embedded import EmbeddedText, embedded_folder
        from sabrage.data.inspect import inspect_shards, render
        from sabrage.data.tokenizer import ByteTokenizer

        corpus = EmbeddedText().open(self.out)
        console = Console()
        console.print(render(inspect_shards(embedded_folder(self.out), tokenizer=ByteTokenizer())))
        facts = corpus.fingerprint
        console.print(f"Python {facts['python']}, unigram entropy {facts['unigram_entropy']:.3f} nats a byte")
        console.print(f"sha256 of the training tokens {facts['sha256']['train']}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Data:
    """Fetch, encode and look into training data.

    Try:
      sabrage data fineweb --shards 3
      sabrage data text book.txt --out data/book
      sabrage data inspect data/book
      sabrage data embedded
    """

    command: Annotated[
        Annotated[Fineweb, tyro.conf.subcommand("fineweb")]
        | Annotated[Text, tyro.conf.subcommand("text")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Embedded, tyro.conf.subcommand("embedded")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Runs the chosen command and returns the exit status. Raises ValueError with the remedy."""
        return self.command.run()
