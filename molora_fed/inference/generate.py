"""Text from a model: greedy or sampled, by the loop of transformers.

Prompts of one length are decoded together and prompts of other lengths apart, so nothing is ever
padded; each prompt draws from its own generator, so its text does not depend on its neighbours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from molora_fed.errors import ConfigError
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.storage.files import hash_bytes
from molora_fed.types import ExpertsPerText, Progress

__all__ = [
    "EvidenceSource",
    "GeneratedText",
    "Sampling",
    "choose_tokens",
    "decode_tokens",
    "generate",
    "make_generator",
    "mark_start",
]

EvidenceSource = Literal["prompt", "all"]
"""Whether a router that reads evidence also reads that of the tokens it generated."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Tokens to add at most, >= 1.
        temperature: 0 takes the likeliest token; above 0, log-probabilities are divided by it.
        top_k: Keep only the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability, in (0, 1].
        seed: Same seed, prompts and model give the same text.
        evidence_from: With "prompt", a router that reads evidence keeps the gates it had after
            the prompt; with "all" it goes on learning from the tokens that were chosen.
        experts_per_text: So many of the best experts after the prompt write its text, their gates
            kept; "merged" merges all of them by these gates; all of them if None.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    evidence_from: EvidenceSource = "all"
    experts_per_text: ExpertsPerText | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range, all of them at once.

        Raises:
            ConfigError: If a value is out of range.
        """
        rules = {
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
            "temperature >= 0": 0 <= self.temperature < float("inf"),
            "top_k >= 0": self.top_k >= 0,
            "top_p in (0, 1]": 0 < self.top_p <= 1,
            "evidence_from 'prompt' or 'all'": self.evidence_from in ("prompt", "all"),
            "experts_per_text >= 1 or 'merged'": self.experts_per_text in (None, "merged")
            or (isinstance(self.experts_per_text, int) and self.experts_per_text >= 1),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ConfigError(
                f"Cannot generate: expected {', '.join(broken)}, got {self}. Correct these options."
            )


@dataclass(frozen=True)
class GeneratedText:
    """One generated text.

    Attributes:
        prompt: What it continues.
        text: What was added, without special tokens.
        tokens: Token ids that were added, the end-of-text token included.
        is_finished: Whether it ended by itself.
        gates: Mean gate by expert or slot over the tokens that were added.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    is_finished: bool
    gates: dict[str, float]


def generate(
    model: FusedForCausalLM,
    prompts: str | Sequence[str],
    sampling: Sampling | None = None,
    *,
    progress: Progress | None = None,
) -> list[GeneratedText]:
    """Continue prompts.

    Args:
        model: The model.
        prompts: One or several texts; an empty one starts a new document.
        sampling: How tokens are chosen.
        progress: Receives tokens done and tokens in all, over all prompts.

    Returns:
        One generation a prompt, in their order.

    Raises:
        ConfigError: If prompt and new tokens exceed the base's positions.
        RoutingError: If the model's router is not causal.
    """
    sampling = sampling or Sampling()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    tokenizer = model.tokenizer
    start = [tokenizer.eos_token_id]
    encoded = [tokenizer.encode(text, add_special_tokens=False) or start for text in texts]
    for ids in encoded:
        _check_length(model, len(ids), sampling)
    groups = list(_group_by_length(encoded))
    results: dict[int, GeneratedText] = {}
    for done, rows in enumerate(groups):
        tokens, gates = decode_tokens(
            model,
            torch.tensor([encoded[i] for i in rows]),
            sampling,
            generators=[make_generator(sampling.seed, row) for row in rows],
            progress=_shift(progress, done, len(groups)),
        )
        for row, index in enumerate(rows):
            results[index] = _describe(model, texts[index], tokens[row], gates[row])
    return [results[index] for index in range(len(texts))]


def _group_by_length(encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of prompts that are decoded together."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    yield from (rows for _, rows in sorted(by_length.items()))


def _shift(progress: Progress | None, group: int, groups: int) -> Progress | None:
    """Overall progress, from the progress of one group of prompts."""
    if progress is None:
        return None
    report = progress

    def shifted(done: int, total: int, **fields: float | str) -> None:
        report(group * total + done, groups * total, **fields)

    return shifted


def _describe(model: FusedForCausalLM, prompt: str, tokens: Tensor, gates: Tensor) -> GeneratedText:
    """Cut at the end-of-text token and turn ids into text."""
    tokenizer = model.tokenizer
    ids = tokens.tolist()
    is_finished = tokenizer.eos_token_id in ids
    if is_finished:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    mean = gates[: len(ids)].mean(0).tolist()
    return GeneratedText(
        prompt=prompt,
        text=tokenizer.decode(ids, skip_special_tokens=True),
        tokens=tuple(ids),
        is_finished=is_finished,
        gates=dict(zip(model.expert_names, mean, strict=True)),
    )


def decode_tokens(
    model: FusedForCausalLM,
    prompt: Tensor,
    sampling: Sampling,
    *,
    generators: Sequence[torch.Generator] | None = None,
    document_starts: Tensor | None = None,
    find_ended: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue token ids of one length.

    Args:
        model: The model.
        prompt: Token ids, (B, P), integer.
        sampling: How tokens are chosen.
        generators: Random numbers of each row; streams 0 .. B-1 of the sampling's seed if None.
        document_starts: True at a document's first token, (B, P) bool; found by the end-of-text
            token if None.
        find_ended: Told the tokens (B,) just chosen, says which rows end with them, (B,) bool;
            those of the end-of-text token if None.
        progress: Receives tokens done and tokens in all.

    Returns:
        New token ids (B, N), N <= max_new_tokens, and the gates that chose them (B, N, E). A row
        that ended goes on with end-of-text tokens; decoding stops when all have ended.

    Raises:
        RoutingError: If the model's router is not causal.
    """
    model.check_causal()
    prompt = prompt.to(device=model.device, dtype=torch.long)
    if generators is None:
        generators = [make_generator(sampling.seed, row) for row in range(len(prompt))]
    end = int(model.tokenizer.eos_token_id)
    cache = model.make_cache()
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=end
    )
    settings.eos_token_id = None  # rows end as `find_ended` says
    given = {} if document_starts is None else {"document_starts": document_starts}
    ended = _Ended(end, find_ended, prompt, sampling, progress)
    text = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        logits_processor=LogitsProcessorList([_Choose(sampling, generators)]),
        stopping_criteria=StoppingCriteriaList([ended]),
        past_key_values=cache,
        evidence_from=sampling.evidence_from,
        experts_per_text=sampling.experts_per_text,
        **given,
    )
    return text[:, prompt.shape[1] :], torch.stack(cache.gates, dim=1)


class _Choose(LogitsProcessor):
    """Chooses each row's token by its own generator, and leaves it as the only one."""

    def __init__(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> None:
        self._sampling = sampling
        self._generators = generators

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores (B, V) with the chosen tokens' at 0 and all others at minus infinity."""
        if self._sampling.temperature == 0:
            return scores
        tokens = choose_tokens(scores, self._sampling, self._generators)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Says which rows have ended; those go on with end-of-text tokens."""

    def __init__(
        self,
        end: int,
        find_ended: Callable[[Tensor], Tensor] | None,
        prompt: Tensor,
        sampling: Sampling,
        progress: Progress | None,
    ) -> None:
        self.eos_token_id = torch.tensor([end])  # tells `generate` to pad rows that have ended
        self._end = end
        self._find_ended = find_ended
        self._length = prompt.shape[1]
        self._ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        self._most = sampling.max_new_tokens
        self._progress = progress

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """Which rows have ended by now, (B,) bool."""
        tokens = input_ids[:, -1]
        found = tokens == self._end if self._find_ended is None else self._find_ended(tokens)
        self._ended = self._ended | found
        if self._progress is not None:
            self._progress(input_ids.shape[1] - self._length, self._most)
        return self._ended


def _check_length(model: FusedForCausalLM, prompt_tokens: int, sampling: Sampling) -> None:
    """Refuse to go beyond the base's positions.

    Raises:
        ConfigError: If prompt and new tokens exceed them.
    """
    limit = model.max_positions
    length = prompt_tokens + sampling.max_new_tokens
    if limit is not None and length > limit:
        raise ConfigError(
            f"Cannot generate after a prompt of {prompt_tokens} tokens: expected at most {limit} "
            f"tokens with the new ones, got {length}. Shorten the prompt or ask for fewer tokens."
        )


def make_generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each prompt, on the CPU, so that devices agree."""
    digest = hash_bytes(f"{seed}/{stream}".encode())
    return torch.Generator().manual_seed(int(digest[:15], 16))


def mark_start(tokens: Tensor) -> Tensor:
    """True at the first position alone, (B, T) bool: each row is one document."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    return starts


def choose_tokens(
    mixed: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """The next token of every row, (B,).

    Args:
        mixed: Log-probabilities of the next token, (B, V) nats.
        sampling: How it is chosen.
        generators: One a row.
    """
    if sampling.temperature == 0:
        return mixed.argmax(-1)
    weights = _filter(mixed.float().cpu() / sampling.temperature, sampling)
    rows = zip(weights, generators, strict=True)
    drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in rows]
    return torch.cat(drawn).to(mixed.device)


def _filter(scores: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the tokens that are kept, (B, V); the rest is 0."""
    probabilities = torch.softmax(scores, dim=-1)
    if sampling.top_p == 1 and not sampling.top_k:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token is kept while those before it have not reached top_p: the first is always kept.
    kept = ordered.cumsum(-1) - ordered < sampling.top_p
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    return torch.zeros_like(probabilities).scatter(-1, index, ordered * kept)
