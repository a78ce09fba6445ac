import ast
import subprocess
import sys
from pathlib import Path

import sabrage.kernels

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from sabrage.kernels.catalogue import OPERATIONS
from sabrage.kernels.language import KernelError

for operation in OPERATIONS:
    for case in operation.cases:
        if case.measured:
            continue
        arguments = operation.inputs(case, torch.Generator().manual_seed(0), torch.float32)
        operation.plain(**arguments, **case.options)
        try:
            operation.fused(**arguments, **case.options)
        except KernelError as error:
            assert "pip install triton" in str(error)
        else:
            raise AssertionError(operation.name)
"""


def test_without_triton_every_reference_runs_and_every_kernel_says_what_is_missing() -> None:
    made = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120, check=False
    )
    assert made.returncode == 0, made.stderr


def unpacked_in_one(source: str) -> list[int]:
    """Lines of kernels that assign to a tuple within a tuple."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if any("jit" in ast.dump(by) for by in node.decorator_list)]
    return [
        node.lineno
        for kernel in kernels
        for node in ast.walk(kernel)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple) and any(isinstance(part, ast.Tuple) for part in target.elts)
    ]


def test_no_kernel_unpacks_a_tuple_within_a_tuple() -> None:
    """Triton 3.6 refuses it with "unhashable type", where a later one compiles it."""
    assert unpacked_in_one("@jit\ndef kernel(x, y):\n    a, (b, c) = x\n    d, e = y") == [3]
    files = list(Path(sabrage.kernels.__file__).parent.glob("*.py"))
    assert any("@jit" in path.read_text(encoding="utf-8") for path in files)
    for path in files:
        assert unpacked_in_one(path.read_text(encoding="utf-8")) == [], path.name
