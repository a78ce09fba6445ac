"""Result files: what a measurement found, with everything that is needed to read it, for results/."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from sabrage.run.folder import write_json
from sabrage.run.manifest import code_state, versions

Column = dict[str, str]


def write_result(
    path: Path,
    *,
    name: str,
    device: str,
    columns: list[Column],
    rows: list[dict[str, Any]],
    track: str | None = None,
    recipe: str | None = None,
    seeds: list[int] | None = None,
    clocks: dict[str, float] | None = None,
    commit: str | None = None,
) -> Path:
    """Writes a result file that `sabrage.report.tables` turns into a table; returns its path.

    `columns` are {"key", "title", "format"}; `commit` is found out where the code is a git checkout.
    """
    state = code_state(Path(__file__).resolve())
    write_json(
        path,
        {
            "name": name,
            "track": track,
            "device": device,
            "versions": versions(),
            "commit": commit or (state["commit"] if state else None),
            "date": datetime.now(UTC).date().isoformat(),
            "recipe": recipe,
            "seeds": seeds,
            "clocks": clocks,
            "columns": columns,
            "rows": rows,
        },
    )
    return path


def table(rows: Sequence[dict[str, Any]], title: str, columns: Sequence[Column]) -> Table:
    """The rows for the terminal; what was not measured is a dash."""
    made = Table(title=title)
    for column in columns:
        made.add_column(column["title"], justify="right" if "format" in column else "left")
    for found in rows:
        cells = [(found.get(column["key"]), column.get("format", "")) for column in columns]
        made.add_row(*("-" if value is None else format(value, form) for value, form in cells))
    return made
