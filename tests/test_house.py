"""House rules that a machine can check: floors, sizes, what an import costs, and that documents are true."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sabrage.cli import parse
from sabrage.cli.describe import Show
from sabrage.cli.train import Train
from sabrage.recipes import changed
from sabrage.report.figure import stale_figures
from sabrage.report.tables import stale_documents

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sabrage"
FILES = sorted(SOURCE.rglob("*.py"))
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]

# From the ground up. A room imports itself and what stands on a lower line, never its neighbour.
FLOORS = [
    {"config", "context", "hashing", "norms", "run"},
    {"kernels", "linear", "schedule"},
    {"parts"},
    {"plan", "losses"},
    {"blend", "data", "attention", "feedforward", "wiring", "objective", "optim", "precision"},
    {"model"},
    {"recipe"},
    {"train", "generate"},
    {"recipes"},
    {"study", "bench", "report", "export"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def named(path):
    return str(path.relative_to(SOURCE))


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """(room, line) of every import of this package, also inside functions and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "sabrage":
                yield name.split(".")[1], node.lineno


def test_every_room_stands_on_a_floor():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_down_the_floors(path):
    room = room_of(path)
    wrong = [
        f"line {line}: {room} imports {other}"
        for other, line in imported_rooms(path)
        if other != room and FLOOR_OF[other] >= FLOOR_OF.get(room, 0)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_and_no_function_is_long(path):
    # Kernels are a third longer: one argument a line.
    in_kernels = room_of(path) == "kernels"
    text = path.read_text()
    assert text.count("\n") <= (400 if in_kernels else 300)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > (80 if in_kernels else 60)} == {}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_is_caught_unnamed_asked_for_by_attribute_or_left_to_do(path):
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    assert [node.lineno for node in nodes if isinstance(node, ast.ExceptHandler) and node.type is None] == []
    assert [node.lineno for node in nodes if isinstance(node, ast.Name) and node.id == "hasattr"] == []
    assert re.findall(r"\b(?:TODO|FIXME)\b", text) == []


def loaded_by(statement):
    """The heavy modules that are loaded after `statement` in a fresh interpreter."""
    script = (
        f"import sys\n{statement}\nprint(*({{'torch', 'numpy', 'triton', 'tiktoken'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_heavy():
    assert loaded_by("import sabrage.cli") == set()


def test_reports_need_no_torch():
    modules = [f"sabrage.report.{path.stem}" for path in (SOURCE / "report").glob("*.py")]
    assert "torch" not in loaded_by("import " + ", ".join(modules))


def test_no_tracked_file_names_a_home_folder_or_the_place_of_this_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("this copy is no git checkout")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    # alice is the user of our examples.
    private = re.compile(rf"(?<![\w.~]){re.escape(str(ROOT))}\b|(?<![\w.~])/(?:home|Users)/(?!alice\b)\w")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        text = path.read_text(errors="replace") if path.is_file() else ""
        found += [f"{name}: {line.strip()}" for line in text.splitlines() if private.search(line)]
    assert found == []


def shell_lines(document):
    """Every line of the document's fenced shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_the_documents_are_commands(document):
    for line in shell_lines(document):
        if line.startswith("sabrage "):
            command = parse(shlex.split(line, comments=True)[1:])
            if isinstance(command, Train | Show):
                changed(command.recipe, command.set).validate()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_make_targets_of_the_documents_exist(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    wanted = [line.split()[1] for line in shell_lines(document) if line.startswith("make ")]
    assert set(wanted) <= set(targets)


def test_the_readme_begins_with_the_two_commands():
    assert shell_lines(ROOT / "README.md")[:2] == ["make demo", "make test"]


def test_the_tables_of_the_documents_are_those_of_the_result_files():
    assert stale_documents(ROOT) == []


def test_the_charts_of_result_files_are_what_the_files_say():
    assert list(stale_figures(ROOT)) == []
