"""Models asked by a judge, with seeds by task: all is written down, or given back from a record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from molora_fed.cascade.contract import CascadeModel, CountsScoring, Request, Sample, Scorer
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = [
    "SEED_BITS",
    "JudgeCall",
    "compute_seed",
    "hash_requests",
    "hash_scoring",
    "playback_models",
    "recording_models",
]


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


LEAST_SCORE = -1e30


@dataclass(frozen=True)
class JudgeCall:
    """One call of a judge to a model.

    Attributes:
        model: Name of the model.
        sort: "sample" or "score".
        request: SHA-256 over what was asked.
        samples: What it cost, and for "sample" what it said, one a request.
        scores: Log-likelihoods in nats, for "score".
    """

    model: str
    sort: Literal["sample", "score"]
    request: str
    samples: tuple[Sample, ...] = ()
    scores: tuple[float, ...] = ()


def hash_requests(requests: Sequence[Request]) -> str:
    """SHA-256 over requests, lower-case hex."""
    return hash_bytes(canonical_json([asdict(request) for request in requests]))


def hash_scoring(prompt: str, answers: Sequence[str]) -> str:
    """SHA-256 over a prompt and the answers to score after it, lower-case hex."""
    return hash_bytes(canonical_json([prompt, list(answers)]))


def _finite(score: float) -> float:
    """A score that JSON can carry: impossible answers are very unlikely ones."""
    return float(score) if math.isfinite(score) else LEAST_SCORE


class _Recording:
    """Asks the model, and keeps what was asked and said."""

    def __init__(self, model: CascadeModel, calls: list[JudgeCall]) -> None:
        self.name = model.name
        self.fingerprint = model.fingerprint
        self.is_local = model.is_local
        self._model: Any = model
        self._calls = calls

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """Answer as the model does."""
        samples = tuple(self._model.sample(requests))
        self._calls.append(JudgeCall(self.name, "sample", hash_requests(requests), samples))
        return samples


class _RecordingScorer(_Recording):
    """The same for a model that scores."""

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """Score as the model does."""
        scores = tuple(_finite(score) for score in self._model.score(prompt, answers))
        counted = isinstance(self._model, CountsScoring)
        cost = (self._model.count_scoring(prompt, answers),) if counted else ()
        asked = hash_scoring(prompt, answers)
        self._calls.append(JudgeCall(self.name, "score", asked, cost, scores))
        return scores


def recording_models(
    models: Mapping[str, CascadeModel], calls: list[JudgeCall]
) -> dict[str, CascadeModel]:
    """Models that behave alike, and append every call to `calls`.

    Args:
        models: By name.
        calls: Where calls are kept.
    """
    return {
        name: (_RecordingScorer if isinstance(model, Scorer) else _Recording)(model, calls)
        for name, model in models.items()
    }


class _Playback:
    """Gives back what was recorded, in order; what was never recorded is a failed sample."""

    is_local = True

    def __init__(self, name: str, fingerprint: str, calls: list[JudgeCall]) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self._calls = calls

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """The recorded samples."""
        call = self._take("sample", hash_requests(requests))
        if call is None or len(call.samples) != len(requests):
            return [Sample("", failure="not in the record") for _ in requests]
        return call.samples

    def _take(self, sort: str, asked: str) -> JudgeCall | None:
        for at, call in enumerate(self._calls):
            if (call.model, call.sort, call.request) == (self.name, sort, asked):
                return self._calls.pop(at)
        return None


class _PlaybackScorer(_Playback):
    """The same for a model that scored."""

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """The recorded log-likelihoods; all zero where none are recorded."""
        call = self._take("score", hash_scoring(prompt, answers))
        if call is None or len(call.scores) != len(answers):
            return [0.0] * len(answers)
        self._cost = call.samples
        return call.scores

    def count_scoring(self, prompt: str, answers: Sequence[str]) -> Sample:
        """The recorded cost of the last scoring."""
        return self._cost[0] if self._cost else Sample("")

    _cost: tuple[Sample, ...] = ()


def playback_models(
    fingerprints: Mapping[str, str], calls: Sequence[JudgeCall], scorers: Sequence[str]
) -> dict[str, CascadeModel]:
    """Models that give back what a record holds.

    Args:
        fingerprints: Of all models of the cascade, by name.
        calls: What the judge asked then.
        scorers: Names of the models that could score.
    """
    left = list(calls)
    return {
        name: (_PlaybackScorer if name in scorers else _Playback)(name, fingerprint, left)
        for name, fingerprint in fingerprints.items()
    }
