"""Seeds of samples: the same task, template, model, environment and number, the same seed."""

from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = ["SEED_BITS", "compute_seed"]

SEED_BITS = 31
"""Every inference server takes seeds of this many bits."""


def compute_seed(
    task_id: str,
    template_hash: str,
    fingerprint: str,
    number: int,
    *,
    environment: str = "",
    run_seed: int = 0,
) -> int:
    """The seed of one sample: the first 31 bits of SHA-256 over everything it depends on.

    Args:
        task_id: The task.
        template_hash: Hash of the prompt template.
        fingerprint: Of the model.
        number: Which sample of this model on this task, from 0.
        environment: Fingerprint of the environment.
        run_seed: Of the run, chosen by people.

    Returns:
        A number in [0, 2**31).
    """
    parts = [task_id, template_hash, fingerprint, number, environment, run_seed]
    return int(hash_bytes(canonical_json(parts))[:8], 16) >> (32 - SEED_BITS)
