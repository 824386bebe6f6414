"""Models on this machine behind the one interface: base, specialist, fused, evolved.

Every prompt is read alone; the samples of one prompt are one batch, each row with its own
generator. The same requests in the same order give the same text on the same versions, threads and
device.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molora_fed.cascade.contract import Request, Sample
from molora_fed.inference.flops import count_cost
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.generate import Sampling, decode_tokens, make_generator, mark_start

__all__ = ["LocalModel"]


class LocalModel:
    """A model of this machine; it samples and scores.

    Attributes:
        name: Unique in a cascade.
        fingerprint: SHA-256 over everything that decides its text.
        is_local: True.
    """

    is_local = True

    def __init__(self, name: str, model: FusedForCausalLM) -> None:
        """Put a model behind the interface.

        Args:
            name: Unique in a cascade.
            model: What reads and writes.

        Raises:
            RoutingError: If its router is not causal.
        """
        model.check_causal()
        self.name = name
        self.fingerprint = model.fingerprint
        self._model = model
        self._cost = count_cost(model)
        self._tokenizer = model.tokenizer
        self._device = model.device
        self._positions = model.max_positions

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
            flops=sum(self._cost.count(len(a) + len(b), 0) for a, b in pairs),
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
        read = tokens[:, :-1]
        output = self._model(
            read, document_starts=mark_start(read), logits_to_keep=len(after), use_cache=True
        )
        log_probs = output.logits[0]  # (answer tokens, V)
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
                flops=self._cost.count(len(ids), count),
                seconds=seconds,
            )
            for text, count in written
        ]

    def _write(self, ids: list[int], requests: Sequence[Request]) -> list[tuple[str, int]]:
        """Text and number of new tokens of every row."""
        first = requests[0]
        rows = [_Row(self._tokenizer, first.stop) for _ in requests]

        def find_ended(tokens: Tensor) -> Tensor:
            for row, chosen in zip(rows, tokens.tolist(), strict=True):
                row.add(chosen)
            return torch.tensor([row.is_over for row in rows], device=tokens.device)

        prompt = torch.tensor([ids] * len(requests), device=self._device)
        decode_tokens(
            self._model,
            prompt,
            Sampling(first.max_new_tokens, first.temperature),
            generators=[make_generator(one.seed, 0) for one in requests],
            document_starts=mark_start(prompt),
            find_ended=find_ended,
        )
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
