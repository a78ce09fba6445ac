"""What a kernel will need on a card that is not there: registers, spills, shared memory.

Triton compiles for any target without a driver; cuobjdump, which its package carries, reads the result.
Spills are counted in the machine code (local stores), since a stack frame alone is not one.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from sabrage.kernels.builds import Build, builds
from sabrage.kernels.language import KernelError, triton

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
# Bytes of shared memory that one program may take.
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448}


@dataclass(frozen=True)
class Footprint:
    """What one build takes: registers and bytes of stack a thread, local stores in its code, bytes of shared
    memory a program; beside what it may take."""

    name: str
    capability: tuple[int, int]
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    max_registers: int
    max_spills: int
    max_shared: int


def footprint(build: Build, *, capability: tuple[int, int]) -> Footprint:
    """Compiles one build for one capability. Raises KernelError without Triton or under the interpreter."""
    if triton is None:
        raise KernelError("offline compilation needs Triton, which is missing; pip install triton")
    if not isinstance(build.kernel, triton.JITFunction):
        raise KernelError(
            "offline compilation got an interpreted kernel; start Python without TRITON_INTERPRET"
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    missing = set(names) ^ (set(build.signature) | set(build.constants))
    if missing:
        raise KernelError(f"{build.name}: arguments that build and kernel do not share: {sorted(missing)}")
    written = [build.signature.get(name, "constexpr") for name in names]
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(written)
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in zip(names, written, strict=True)}
    source = ASTSource(build.kernel, types, build.constants, aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    registers, stack, spills = _resources(compiled.asm["cubin"])
    return Footprint(
        name=build.name,
        capability=capability,
        num_warps=build.num_warps,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=compiled.metadata.shared,
        max_registers=build.max_registers,
        max_spills=build.max_spills,
        max_shared=SHARED_MEMORY[capability],
    )


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of stack, local stores) of a compiled kernel."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [tool, "-res-usage", path], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        registers, stack = int(found[1]), int(found[2])
        if not stack:
            # Nothing to store to; reading the code would take a third of the time.
            return registers, 0, 0
        code = subprocess.run(
            [tool, "-sass", path], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    return registers, stack, len(re.findall(r"\bSTL\b", code))


def all_footprints() -> list[Footprint]:
    """Every build for every capability."""
    return [footprint(build, capability=each) for each in CAPABILITIES for build in builds(each)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Print what every kernel takes on every capability, as JSON."
    )
    parser.parse_args()
    print(json.dumps([asdict(found) for found in all_footprints()], indent=1))
