"""Every operation on every small case: the error gate, one graph under torch.compile, sound registration."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sabrage.kernels.cases import Case, Operation, failures
from sabrage.kernels.catalogue import OPERATIONS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = [
    pytest.param(operation, case, id=f"{operation.name}-{case.name}")
    for operation in OPERATIONS
    for case in operation.cases
    if not case.measured
]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("operation", "case"), SMALL)
def test_interpreted_kernel_errs_at_most_twice_as_much_as_torch(
    operation: Operation, case: Case, dtype: torch.dtype, poisoned: None
) -> None:
    assert failures(operation, case, CPU, dtype) == []


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operation", "case"), SMALL)
def test_kernel_errs_at_most_twice_as_much_as_torch(
    operation: Operation, case: Case, dtype: torch.dtype, poisoned: None
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert failures(operation, case, CUDA, dtype) == []


def one_graph(
    operation: Operation, case: Case, device: torch.device, backend: str, dtype: torch.dtype
) -> None:
    """Compiled without breaks into one graph, with the outputs and gradients of the eager call."""
    arguments = operation.inputs(case, torch.Generator(device).manual_seed(0), dtype)
    found = []
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda **given: operation.fused(**given), backend=graphs, fullgraph=True, dynamic=False
    )
    for function in (operation.fused, compiled):
        learning = operation.learning(arguments)
        outputs = function(**arguments | learning, **case.options)
        if learning:
            outputs[0].float().square().sum().backward()
        found.append([*outputs, *(leaf.grad for leaf in learning.values())])
    assert graphs.frame_count == 1
    torch._dynamo.reset()
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager)


@interpreted
@pytest.mark.parametrize(("operation", "case"), SMALL)
def test_compiling_a_kernel_keeps_one_graph(operation: Operation, case: Case) -> None:
    one_graph(operation, case, CPU, "aot_eager", torch.float32)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("operation", "case"), {marked.values[0].name: marked for marked in reversed(SMALL)}.values()
)
def test_inductor_keeps_one_graph_on_the_device(operation: Operation, case: Case) -> None:
    one_graph(operation, case, CUDA, "inductor", torch.bfloat16)
