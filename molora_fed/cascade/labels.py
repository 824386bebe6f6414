"""What the "run" record says of a cascade: everything that decides its decisions."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from molora_fed.cascade.contract import EscalationPolicy, Scorer
from molora_fed.cascade.running import Cascade
from molora_fed.errors import CascadeError
from molora_fed.plugins import Plugins

__all__ = ["describe_cascade", "describe_options"]

MAX_POLICY_FILE_BYTES = 1_000_000


def describe_options(policy: EscalationPolicy) -> dict[str, Any]:
    """A policy's options, and the text of the files among them, so that a trace needs no other.

    Args:
        policy: The policy.

    Raises:
        CascadeError: If a file is too large, or no text.
    """
    options: dict[str, Any] = {}
    files: dict[str, str] = {}
    if isinstance(policy.options, BaseModel):
        options = policy.options.model_dump(mode="json")
        values = {name: getattr(policy.options, name) for name in options}
        for name, path in values.items():
            if isinstance(path, Path):
                options[name] = path.name
                files[name] = _read_text(path)
    return {"options": options, **({"files": files} if files else {})}


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_POLICY_FILE_BYTES:
            raise ValueError(f"more than {MAX_POLICY_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CascadeError(
            f"Cannot record policy file '{path}': expected text of at most "
            f"{MAX_POLICY_FILE_BYTES} bytes, got {error}. Fit a smaller one."
        ) from error


def describe_cascade(cascade: Cascade, plugins: Plugins) -> dict[str, Any]:
    """What the "run" record says of a cascade: everything that decides its records.

    Args:
        cascade: The cascade.
        plugins: Where its policy, judge and extractors are registered.
    """
    settings = cascade.settings
    return {
        "probe": cascade.lineup.probe,
        "members": list(cascade.lineup.members),
        "models": {
            name: {
                "fingerprint": model.fingerprint,
                "is_local": model.is_local,
                "scores": isinstance(model, Scorer),
            }
            for name, model in sorted(cascade.models.items())
        },
        "policy": {
            "name": cascade.policy_name,
            **describe_options(cascade.policy),
            "origin": plugins.escalation_policies.entry(cascade.policy_name).origin,
        },
        "judge": {
            "name": cascade.judge_name,
            "options": dict(cascade.judge_options),
            "origin": plugins.judges.entry(cascade.judge_name).origin,
        },
        "extractors": {
            name: plugins.extractors.entry(name).origin for name in sorted(cascade.extractors)
        },
        "settings": {
            "samples": settings.samples,
            "temperature": settings.temperature,
            "member_temperature": settings.member_temperature,
            "max_new_tokens": settings.max_new_tokens,
            "stop": list(settings.stop),
            "seed": settings.seed,
        },
        "template": {
            "text": settings.template.text,
            "example": settings.template.example,
            "sha256": settings.template.hash,
        },
        "retrieval": None if cascade.retrieval is None else cascade.retrieval.describe(),
        "environment": cascade.environment,
    }
