"""Where and how models compute: device, dtype, memory, threads, determinism, versions."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from molora_fed.errors import ComputeError
from molora_fed.storage.compute import Compute

__all__ = [
    "Placement",
    "check_memory",
    "choose_placement",
    "describe_environment",
    "deterministic",
    "format_bytes",
    "limit_threads",
    "mixed_precision",
]

_LIBRARIES = ("accelerate", "numpy", "peft", "torch", "transformers")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Where a model's weights lie, and in which dtype it computes.

    Losses, log-probabilities, sums and what an optimiser trains are float32 whatever `dtype` is.

    Attributes:
        device: The device of all its weights.
        dtype: Dtype of its weights and of its matrix products.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @staticmethod
    def of(model: Any) -> "Placement":
        """Where a loaded model is."""
        return Placement(model.device, model.dtype)


def choose_placement(compute: Compute, usual: str = "float32") -> Placement:
    """Decide on a device and a dtype of this machine.

    Args:
        compute: What is asked for.
        usual: The dtype that "auto" stands for: the one that losses are reported in.

    Raises:
        ComputeError: If this machine lacks the device, or the device the dtype.
    """
    device = compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if chosen.index >= count:
            there = f"{count} of them" if count else "none that torch can use"
            raise ComputeError(
                f"Cannot compute on '{compute.device}': expected a CUDA device of this machine, "
                f"got {there}. Use --device cpu, or install torch for your accelerator."
            )
    dtype = _DTYPES[usual if compute.dtype == "auto" else compute.dtype]
    if chosen.type == "cuda" and dtype is torch.bfloat16:
        with torch.cuda.device(chosen):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise ComputeError(
                    f"Cannot compute in bfloat16 on '{chosen}': expected a device that has it, "
                    f"got {torch.cuda.get_device_name(chosen)}. Use --dtype float32."
                )
    return Placement(chosen, dtype)


def format_bytes(count: float) -> str:
    """A size for people, e.g. "1.3 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def find_free_bytes(device: torch.device) -> int:
    """Memory that new weights may take: of the accelerator, or of this process's group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:  # "max" where there is none
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)


def check_memory(needed: int, device: torch.device, *, what: str, fix: str) -> None:
    """Refuse work that does not fit, before it starts.

    Args:
        needed: Bytes, as far as they can be foreseen.
        device: Where.
        what: What would need them, the start of the message.
        fix: What to do instead, one sentence.

    Raises:
        ComputeError: If fewer bytes are free.
    """
    free = find_free_bytes(device)
    if needed > free:
        raise ComputeError(
            f"{what}: needs about {format_bytes(needed)} on {device}, {format_bytes(free)} are "
            f"free. {fix}"
        )


def describe_environment(device: str) -> dict[str, str]:
    """Versions and hardware that decide the bytes of a training run beside its inputs.

    Args:
        device: Device type, e.g. "cpu".
    """
    python = ".".join(platform.python_version_tuple()[:2])
    hardware = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    found = {name: version(name) for name in _LIBRARIES}
    return {**found, "python": python, "device": device, "hardware": hardware}


@contextmanager
def mixed_precision(placement: Placement) -> Iterator[None]:
    """Run matrix products in a placement's dtype, of float32 parameters, too.

    Nothing changes in float32.
    """
    with torch.autocast(
        placement.device.type, placement.dtype, enabled=placement.dtype is not torch.float32
    ):
        yield


@contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Run torch on this many threads; the number decides the last bits of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Refuse operations whose bytes differ from run to run, where the device has such."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
