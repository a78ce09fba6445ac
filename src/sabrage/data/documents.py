"""Documents out of files: a .txt file is one, a .jsonl file has one a line, a .parquet file one a row.

Blank documents are left out. Whatever cannot be read stops with the name of the file and the line.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sabrage.parts import DataError


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The readable files among `paths` and, by name, in the folders among them. Raises DataError."""
    found: list[Path] = []
    allowed = ", ".join(READERS)
    for path in paths:
        if path.is_dir():
            found.extend(
                sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
            )
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        elif path.suffix not in READERS:
            raise DataError(
                f"{path}: got a {path.suffix or 'nameless'} file, allowed: {allowed}; convert it first"
            )
        else:
            found.append(path)
    if not found:
        raise DataError(f"found no file to read, allowed: {allowed}; name files or folders that hold some")
    return found


def read_documents(files: Iterable[Path], field: str) -> Iterator[str]:
    """Every document of the files, in order; `field` is the text's name in .jsonl and .parquet."""
    for path in files:
        yield from (text for text in READERS[path.suffix](path, field) if text.strip())


def read_text(path: Path, field: str) -> Iterator[str]:
    """The whole file as one document."""
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); convert it, for instance with iconv") from error


def read_json_lines(path: Path, field: str) -> Iterator[str]:
    """The field of each line; empty lines are passed over."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error}); mend or remove the line"
                ) from error
            if not isinstance(row, dict) or field not in row:
                names = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}, not an object"
                raise DataError(
                    f"{path}, line {number}: no field {field!r}, it has: {names}; name the text with --field"
                )
            yield as_text(row[field], f"{path}, line {number}", field)


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """The column's rows. Raises DataError, too, when pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: reading .parquet takes pyarrow, which is not installed; pip install 'sabrage[parquet]'"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error}); fetch or write it again") from error
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(
                f"{path}: no column {field!r}, it has: {', '.join(names)}; name the text with --field"
            )
        for batch in file.iter_batches(columns=[field], batch_size=1024):
            for value in batch.column(0).to_pylist():
                yield as_text(value, str(path), field)


def as_text(value: object, place: str, field: str) -> str:
    """The value when it is text, "" for null. Raises DataError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {field!r} is {type(value).__name__}, allowed: text or null; name another with --field"
        )
    return value


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}
