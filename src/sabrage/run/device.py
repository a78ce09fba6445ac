"""Facts about the device: what it is, what it can do and how fast it could be.

Peak matrix rates are the vendors' dense figures (no sparsity), used only as the denominator of model FLOP
utilisation; a device that is not listed has no utilisation rather than a guessed one.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Dense TFLOP/s by format, from the vendors' datasheets: name fragment -> rates.
PEAKS: dict[str, dict[str, float]] = {
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989, "fp8": 1979},
    "H100 NVL": {"fp32": 60, "tf32": 418, "bf16": 835, "fp16": 835, "fp8": 1671},
    "H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756, "fp8": 1513},
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989, "fp8": 1979},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362, "fp8": 733},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3},
    "RTX 3090 Ti": {"fp32": 40, "tf32": 40, "bf16": 80, "fp16": 80},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.2, "fp16": 71.2},
}


@dataclass(frozen=True)
class DeviceFacts:
    """What the device is and can do; sizes in bytes, rates in FLOP/s, `capability` None off CUDA.

    `triton` is the version of the Triton installed beside it, None where there is none. `products` is the
    format of the run's matrix products (fp32, tf32, bf16, ...), None where no recipe has said it yet; `dim`
    is the model's width, likewise. `documents` says whether rows hold documents that do not see each other.
    """

    kind: str
    name: str
    memory: int
    capability: tuple[int, int] | None = None
    num_multiprocessors: int = 0
    shared_memory_per_block: int = 0
    peaks: dict[str, float] = field(default_factory=dict)
    triton: str | None = None
    products: str | None = None
    dim: int | None = None
    documents: bool = False

    @property
    def has_bf16(self) -> bool:
        """Fast bf16 matrix products: compute capability 8.0, any current CPU or Apple GPU (slowly)."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """FP8 matrix products: compute capability 8.9 (Ada), 9.0 (Hopper) and later."""
        return self.capability is not None and self.capability >= (8, 9)


def probe(device: torch.device | str) -> DeviceFacts:
    """The facts of one device. Raises ValueError, with the remedy, when the device is not there."""
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device 'cuda' was asked for and torch sees no CUDA device; use --device cpu, or install a "
                "CUDA build of torch and check the driver with nvidia-smi"
            )
        properties = torch.cuda.get_device_properties(device)
        match = next((rates for name, rates in PEAKS.items() if name in properties.name), {})
        return DeviceFacts(
            kind="cuda",
            name=properties.name,
            memory=properties.total_memory,
            capability=(properties.major, properties.minor),
            num_multiprocessors=properties.multi_processor_count,
            shared_memory_per_block=getattr(properties, "shared_memory_per_block_optin", 0),
            peaks={name: rate * 1e12 for name, rate in match.items()},
            triton=triton_version(),
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for and torch sees no Apple GPU; use --device cpu")
    return DeviceFacts(kind=device.type, name=processor_name(), memory=host_memory(), triton=triton_version())


def choose_device(name: str = "auto") -> torch.device:
    """The named device; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_memory(device: torch.device | str) -> int:
    """Bytes that a new run could take on this device now; 0 where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return host_memory()


def host_memory() -> int:
    """Bytes of main memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def processor_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def triton_version() -> str | None:
    """The version of the installed Triton, or None."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver: from NVML where `nvidia-ml-py` is installed, else from the kernel."""
    try:
        import pynvml
    except ImportError:
        loaded = Path("/sys/module/nvidia/version")
        return loaded.read_text().strip() if loaded.exists() else None
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        # NVML without a driver: the package is there and the GPU is not.
        return None
    return version.decode() if isinstance(version, bytes) else version


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on the CPU by one thread within the `with` block; also a decorator.

    Small tensors are done sooner so, and by far where other programs compute: threads wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
