"""The tables of the documents, generated from the committed result files, so that no number is typed.

A document says `<!-- table:NAME -->` and `<!-- /table -->`, each on its own line; what lies between them is
the table of the result file of that name, `results/*.json`:

    {"name", "track", "device", "versions", "commit", "date", "recipe", "seeds", "clocks", "columns", "rows"}

A field that does not apply is null. `columns` is a list of `{"key", "title", "format"}`, the format being
Python's (".4f"); `rows` is a list of objects by key.
"""

import json
import re
from pathlib import Path
from typing import Any

from sabrage.run.units import duration

FIELDS = (
    "name", "track", "device", "versions", "commit", "date", "recipe", "seeds", "clocks", "columns", "rows",
)  # fmt: skip
BLOCK = re.compile(
    r"^<!-- table:(?P<name>[\w-]+) -->\n(?P<body>.*?)^<!-- /table -->$", flags=re.MULTILINE | re.DOTALL
)
OPENING = re.compile(r"^<!-- table:", flags=re.MULTILINE)


class ResultError(ValueError):
    """A result file or a document's table mark that cannot be used: names the file and the remedy."""


def render_tables(root: Path) -> dict[Path, str]:
    """The new text of README.md and of every document in docs/ that has table marks. Raises ResultError."""
    results = read_results(root / "results")
    documents = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    rendered = {}
    for document in documents:
        text = document.read_text(encoding="utf-8") if document.is_file() else ""
        if OPENING.search(text):
            rendered[document] = _fill(text, results, document)
    return rendered


def write_tables(root: Path) -> list[Path]:
    """Brings every table up to date; the documents that changed."""
    stale = stale_documents(root)
    for document in stale:
        document.write_text(render_tables(root)[document], encoding="utf-8")
    return stale


def stale_documents(root: Path) -> list[Path]:
    """The documents whose tables are not what their result files say."""
    rendered = render_tables(root)
    return [path for path, text in rendered.items() if path.read_text(encoding="utf-8") != text]


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file by its name, each with all its fields. Raises ResultError."""
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        if result["name"] in results:
            raise ResultError(f"{path}: another result file is called {result['name']!r}; rename one")
        results[result["name"]] = result
    return results


def read_result(path: Path) -> dict[str, Any]:
    """One result file. Raises ResultError when it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{path} is not a result file: {error}; give a JSON file of results/") from error
    missing = [field for field in FIELDS if field not in result]
    if missing:
        raise ResultError(f"{path} lacks {', '.join(missing)}; write null where a field does not apply")
    return result


def _fill(text: str, results: dict[str, dict[str, Any]], document: Path) -> str:
    if len(OPENING.findall(text)) != len(BLOCK.findall(text)):
        raise ResultError(f"{document}: a table mark has no `<!-- /table -->` on a line of its own below it")

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in results:
            known = ", ".join(results) or "none"
            raise ResultError(f"{document}: no result file is called {name!r}; there are: {known}")
        return f"<!-- table:{name} -->\n{table(results[name])}<!-- /table -->"

    return BLOCK.sub(block, text)


def table(result: dict[str, Any]) -> str:
    """The markdown table of one result, with a line below it that says where the numbers come from."""
    titles, numeric, rows = cells(result)
    lines = [
        _row(titles),
        _row(["---:" if right else "---" for right in numeric]),
        *map(_row, rows),
    ]
    return "\n".join(lines) + f"\n\n*{source(result)}*\n"


def cells(result: dict[str, Any]) -> tuple[list[str], list[bool], list[list[str]]]:
    """(titles, whether a column holds numbers, rows of texts) of a result's table."""
    columns = result["columns"]
    rows = [
        [_cell(row.get(column["key"]), column.get("format", "")) for column in columns]
        for row in result["rows"]
    ]
    numeric = [
        all(isinstance(row.get(column["key"]), int | float | None) for row in result["rows"])
        for column in columns
    ]
    return [column["title"] for column in columns], numeric, rows


def source(result: dict[str, Any]) -> str:
    """Track, recipe, device, versions, seeds, clocks, commit and date in one line."""
    facts = [f"track {result['track']}" if result["track"] else None]
    if result["recipe"]:
        recipe = result["recipe"]
        facts.append(
            f"recipe {recipe if isinstance(recipe, str) else recipe.get('name', recipe.get('part'))}"
        )
    facts.append(result["device"])
    facts += [f"{name} {version}" for name, version in (result["versions"] or {}).items() if version]
    if result["seeds"]:
        facts.append("seeds " + ", ".join(map(str, result["seeds"])))
    facts += [
        f"{name} {duration(seconds)}"
        for name, seconds in (result["clocks"] or {}).items()
        if seconds is not None
    ]
    facts += [f"commit {result['commit'][:10]}" if result["commit"] else None, result["date"]]
    return "; ".join(fact for fact in facts if fact)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if not isinstance(value, str) else value


def _row(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
