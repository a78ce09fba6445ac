import subprocess
import sys

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
