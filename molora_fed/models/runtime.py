"""Where and how models compute: threads, determinism, versions."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

__all__ = [
    "describe_environment",
    "deterministic",
    "limit_threads",
]


_LIBRARIES = ("accelerate", "numpy", "peft", "torch", "transformers")


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
