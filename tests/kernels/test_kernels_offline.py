"""Every kernel compiled for cards that are not there, in a process of its own: here they are interpreted."""

import json
import os
import subprocess
import sys

import pytest

from sabrage.kernels.language import KernelError, triton
from sabrage.kernels.offline import CAPABILITIES, builds, footprint


@pytest.fixture(scope="module")
def footprints() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sabrage.kernels.offline"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


def test_every_kernel_compiles_for_every_capability(footprints: list[dict]) -> None:
    compiled = {(found["name"], tuple(found["capability"])) for found in footprints}
    wanted = {(build.name, capability) for capability in CAPABILITIES for build in builds(capability)}
    assert compiled == wanted


def test_no_kernel_spills_beyond_its_design(footprints: list[dict]) -> None:
    assert [found for found in footprints if found["spills"] > found["max_spills"]] == []
    assert [found for found in footprints if found["stack"] and not found["max_spills"]] == []


def test_every_kernel_keeps_to_its_registers(footprints: list[dict]) -> None:
    assert [found for found in footprints if found["registers"] > found["max_registers"]] == []
    register_file = 65536
    assert [
        found for found in footprints if found["registers"] * 32 * found["num_warps"] > register_file
    ] == []


def test_every_kernel_fits_the_shared_memory(footprints: list[dict]) -> None:
    assert {found["max_shared"] for found in footprints} == {163 * 1024, 99 * 1024, 227 * 1024}
    assert [found for found in footprints if found["shared"] > found["max_shared"]] == []


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here, not interpreted")
def test_an_interpreted_kernel_is_refused() -> None:
    build = builds((8, 6))[0]
    with pytest.raises(KernelError, match="TRITON_INTERPRET"):
        footprint(build, capability=(8, 6))
