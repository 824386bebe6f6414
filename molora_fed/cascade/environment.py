"""The environment of a run: versions, hardware and threads that decide the last bits of a text."""

from molora_fed import __version__
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["describe_run_environment", "fingerprint_environment"]


def describe_run_environment(device: str = "cpu") -> dict[str, str]:
    """Versions, hardware, device and torch threads.

    Args:
        device: Device type, e.g. "cpu".
    """
    import torch

    from molora_fed.models.runtime import describe_environment

    return {
        "molora-fed": __version__,
        **describe_environment(device),
        "threads": str(torch.get_num_threads()),
    }


def fingerprint_environment(environment: dict[str, str]) -> str:
    """SHA-256 of a description, lower-case hex."""
    return hash_bytes(canonical_json(environment))
