"""Models on this machine behind the one interface: base, specialist, fused, evolved.

Every prompt is read alone; the samples of one prompt are one batch, each row with its own
generator. The same requests in the same order give the same text on the same versions, threads and
device.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from molora_fed.adapters.updates import Adapter
from molora_fed.cascade.contract import Request, Sample
from molora_fed.inference.decoding import PREFILL_TOKENS, Sampling, choose_tokens, make_generator
from molora_fed.inference.engines import Engine, EvolvedEngine, FusedEngine, PlainEngine
from molora_fed.models.base import Base
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.files import fingerprint_population
from molora_fed.population.router_files import pack_router
from molora_fed.routing.fused import FusedModel
from molora_fed.routing.top_k import TopKRouter
from molora_fed.storage.files import canonical_json, hash_bytes

__all__ = [
    "LocalModel",
    "build_base_model",
    "build_evolved_model",
    "build_fused_model",
    "build_specialist_model",
]


class LocalModel:
    """A model of this machine; it samples and scores.

    Attributes:
        name: Unique in a cascade.
        fingerprint: SHA-256 over everything that decides its text.
        is_local: True.
    """

    is_local = True

    def __init__(self, name: str, fingerprint: str, base: Base, engine: Engine) -> None:
        """Put a model behind the interface.

        Args:
            name: Unique in a cascade.
            fingerprint: Of everything that decides its text.
            base: Base whose tokenizer and positions count.
            engine: What reads and writes.
        """
        self.name = name
        self.fingerprint = fingerprint
        self._engine = engine
        self._tokenizer = base.tokenizer
        self._device = base.model.device
        config = base.model.config.get_text_config()
        self._positions: int | None = getattr(config, "max_position_embeddings", None)

    def sample(self, requests: Sequence[Request]) -> Sequence[Sample]:
        """Answer requests; those that differ in their seed alone are one batch.

        A prompt that leaves no room for the new tokens is a failed sample.

        Args:
            requests: What is asked.
        """
        batches: dict[tuple[Any, ...], list[int]] = {}
        for at, one in enumerate(requests):
            key = (one.prompt, one.max_new_tokens, one.temperature, one.stop)
            batches.setdefault(key, []).append(at)
        found: dict[int, Sample] = {}
        for rows in batches.values():
            found |= dict(zip(rows, self._sample_batch([requests[at] for at in rows]), strict=True))
        return [found[at] for at in range(len(requests))]

    def score(self, prompt: str, answers: Sequence[str]) -> Sequence[float]:
        """Log-likelihood of each answer after the prompt, summed over its tokens, nats.

        Prompt and answer are tokenized apart. Of a text longer than the model's positions the
        beginning is left out.

        Args:
            prompt: Text before the answers.
            answers: Texts; an empty one scores 0.
        """
        return [self._score_one(*self._encode_pair(prompt, answer)) for answer in answers]

    def count_scoring(self, prompt: str, answers: Sequence[str]) -> Sample:
        """Tokens and operations of scoring these answers, as a sample without text.

        Args:
            prompt: Text before the answers.
            answers: Texts.
        """
        pairs = [self._encode_pair(prompt, answer) for answer in answers]
        return Sample(
            "",
            prompt_tokens=sum(len(before) + len(after) for before, after in pairs),
            flops=sum(self._engine.cost.count(len(a) + len(b), 0) for a, b in pairs),
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode_pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of prompt and answer that fit into the model's positions."""
        before = self._encode(prompt) or [self._tokenizer.eos_token_id]
        after = self._encode(answer)
        if self._positions is not None:
            after = after[: self._positions - 1]
            before = before[-(self._positions - len(after)) :]
        return before, after

    def _score_one(self, before: list[int], after: list[int]) -> float:
        if not after:
            return 0.0
        tokens = torch.tensor([before + after], device=self._device)
        targets = torch.tensor(after, device=self._device)
        pieces = []
        with self._engine.reading(1) as step:
            for piece in tokens[:, :-1].split(PREFILL_TOKENS, dim=1):
                pieces.append(step(piece)[0])
        log_probs = torch.cat(pieces)[-len(after) :]  # (answer tokens, V)
        return float(log_probs.gather(-1, targets.unsqueeze(-1)).double().sum())

    def _sample_batch(self, requests: Sequence[Request]) -> list[Sample]:
        """Samples of one prompt, rows of one batch."""
        first = requests[0]
        ids = self._encode(first.prompt) or [self._tokenizer.eos_token_id]
        if self._positions is not None and len(ids) + first.max_new_tokens > self._positions:
            failure = (
                f"prompt of {len(ids)} tokens leaves no room for {first.max_new_tokens} new ones "
                f"in {self._positions} positions"
            )
            return [Sample("", failure=failure) for _ in requests]
        started = time.perf_counter()
        written = self._write(ids, requests)
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            Sample(
                text=text,
                prompt_tokens=len(ids),
                new_tokens=count,
                flops=self._engine.cost.count(len(ids), count),
                seconds=seconds,
            )
            for text, count in written
        ]

    def _write(self, ids: list[int], requests: Sequence[Request]) -> list[tuple[str, int]]:
        """Text and number of new tokens of every row."""
        first = requests[0]
        sampling = Sampling(first.max_new_tokens, first.temperature)
        generators = [make_generator(one.seed, 0) for one in requests]
        rows = [_Row(self._tokenizer, first.stop) for _ in requests]
        prompt = torch.tensor([ids] * len(requests), device=self._device)
        with self._engine.reading(len(requests)) as step:
            for piece in prompt.split(PREFILL_TOKENS, dim=1):
                log_probs = step(piece)[:, -1]
            for left in reversed(range(first.max_new_tokens)):
                token = choose_tokens(log_probs, sampling, generators)
                for row, chosen in zip(rows, token.tolist(), strict=True):
                    row.add(chosen)
                if not left or all(row.is_over for row in rows):
                    break
                log_probs = step(token.unsqueeze(1))[:, -1]
        return [(row.text, len(row.tokens)) for row in rows]


class _Row:
    """What one sample has written; it is over at the end-of-text token or a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self.tokens: list[int] = []
        self.text = ""
        self.is_over = False

    def add(self, token: int) -> None:
        if self.is_over:
            return
        self.tokens.append(token)
        self.text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [at for stop in self._stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        self.is_over = bool(found) or token == self._tokenizer.eos_token_id


def _fingerprint(sort: str, base: Base, *parts: Any) -> str:
    identity = [sort, base.weights, base.tokenizer_fingerprint, str(base.model.dtype), *parts]
    return hash_bytes(canonical_json(identity))


def build_base_model(name: str, base: Base) -> LocalModel:
    """A base checkpoint, or any checkpoint loaded as one.

    Args:
        name: Unique in a cascade.
        base: The checkpoint.
    """
    return LocalModel(name, _fingerprint("base", base), base, PlainEngine(base.model))


def build_specialist_model(name: str, base: Base, adapter: Adapter) -> LocalModel:
    """A specialist: a copy of the base with an adapter's updates added to its weights.

    Args:
        name: Unique in a cascade.
        base: Its base.
        adapter: What it adds.

    Raises:
        IncompatibleAdapterError: If the adapter does not fit the base.
    """
    fingerprint = _fingerprint("specialist", base, adapter.hash)
    return LocalModel(name, fingerprint, base, PlainEngine(base.model, adapter))


def build_fused_model(name: str, fused: FusedModel) -> LocalModel:
    """A fused model.

    Args:
        name: Unique in a cascade.
        fused: The model.

    Raises:
        RoutingError: If its router is not causal.
    """
    router = {
        key: hash_bytes(tensor.detach().cpu().float().numpy().tobytes())
        for key, tensor in fused.router.state_tensors().items()
    }
    experts = [[e.name, None if e.adapter is None else e.adapter.hash] for e in fused.experts]
    options = fused.router.options.model_dump(mode="json")
    top_k = fused.router.top_k if isinstance(fused.router, TopKRouter) else None
    parts = (experts, fused.router_name, options, router, top_k, fused.mixture)
    fingerprint = _fingerprint("fused", fused.base, *parts)
    return LocalModel(name, fingerprint, fused.base, FusedEngine(fused))


def build_evolved_model(name: str, evolved: EvolvedModel) -> LocalModel:
    """An evolved model.

    Args:
        name: Unique in a cascade.
        evolved: The model.
    """
    router = hash_bytes(pack_router(evolved.router, evolved.router_name))
    parts = (fingerprint_population(evolved.population), evolved.router_name, router)
    fingerprint = _fingerprint("evolved", evolved.base, *parts)
    return LocalModel(name, fingerprint, evolved.base, EvolvedEngine(evolved))
