"""Several processes give the losses of one. Two real ones talk through gloo on this machine."""

import os
import socket
import subprocess
import sys

import pytest

from sabrage.config import override
from sabrage.run.folder import read_run


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def run_two(arguments, folder):
    """Both processes of `python -m sabrage train`, as torchrun would start them; their outputs and codes."""
    port = free_port()
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "sabrage", "train", "demo", *arguments],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | place | meeting,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs, [process.returncode for process in processes]


@pytest.mark.parametrize("layers", ["null", '{"part": "Stages", "values": [1, 2], "starts": [0, 6]}'])
def test_two_processes_give_the_losses_of_one_and_one_run_folder(
    tiny, tiny_options, run_recipe, tmp_path, layers
):
    tiny = override(tiny, f"plan.layers={layers}")
    more = ["--set", "runtime.micro_batch=1", "--set", f"plan.layers={layers}"]
    outputs, codes = run_two([*tiny_options, *more], tmp_path)
    assert codes == [0, 0], outputs
    (folder,) = (tmp_path / "runs").iterdir()
    run, (_, alone) = read_run(folder), run_recipe(tiny)
    for event in ("train", "validation"):
        pairs = list(zip(run.events(event), alone.events(event), strict=True))
        assert pairs
        for ours, theirs in pairs:
            assert ours["step"] == theirs["step"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert (run.result["processes"], run.manifest["processes"], run.result["tokens"]) == (2, 2, 12 * 128)
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert "validation loss" in outputs[0]
    assert outputs[1] == ""
