"""Text from a fused model: greedy or sampled, with a cache, the router stepping along.

Prompts of one length are decoded together and prompts of other lengths apart, so nothing is ever
padded; each prompt draws from its own generator, so its text does not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from molora_fed.errors import ConfigError, RoutingError
from molora_fed.routing.fused import FusedModel, Runner, mix_distributions
from molora_fed.storage.files import hash_bytes
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "EvidenceSource",
    "Generation",
    "Sampling",
    "check_length",
    "choose_tokens",
    "decode_tokens",
    "generate",
    "make_generator",
]

EvidenceSource = Literal["prompt", "all"]
"""Whether a router that reads evidence also reads that of the tokens it generated."""

PREFILL_TOKENS = 128
"""Positions of a prompt read at once: bounds the memory of experts' distributions."""


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
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    evidence_from: EvidenceSource = "all"

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
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ConfigError(
                f"Cannot generate: expected {', '.join(broken)}, got {self}. Correct these options."
            )


@dataclass(frozen=True)
class Generation:
    """One generated text.

    Attributes:
        prompt: What it continues.
        text: What was added, without special tokens.
        tokens: Token ids that were added, the end-of-text token included.
        is_finished: Whether it ended by itself.
        gates: Mean gate by expert over the tokens that were added.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    is_finished: bool
    gates: dict[str, float]


def generate(
    fused: FusedModel,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    evidence_from: EvidenceSource = "all",
    progress: Progress | None = None,
) -> list[Generation]:
    """Continue prompts.

    Args:
        fused: The fused model.
        prompts: One or several texts; an empty one starts a new document.
        max_new_tokens: See `Sampling`, also for the arguments up to `evidence_from`.
        temperature: See `Sampling`.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        seed: See `Sampling`.
        evidence_from: See `Sampling`.
        progress: Receives tokens done and tokens in all, per prompt length.

    Returns:
        One generation a prompt, in their order.

    Raises:
        ConfigError: If an option is out of range, or prompt and new tokens exceed the base's
            positions.
        RoutingError: If the router is not causal.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, evidence_from)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    tokenizer = fused.base.tokenizer
    start = [tokenizer.eos_token_id]
    encoded = [tokenizer.encode(text, add_special_tokens=False) or start for text in texts]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    results: dict[int, Generation] = {}
    for done, length in enumerate(sorted(by_length)):
        rows = by_length[length]
        tokens, gates = decode_tokens(
            fused,
            torch.tensor([encoded[i] for i in rows]),
            sampling,
            streams=rows,
            progress=_shift(progress, done, len(by_length)),
        )
        for row, index in enumerate(rows):
            results[index] = _describe(fused, texts[index], tokens[row], gates[row])
    return [results[index] for index in range(len(texts))]


def _shift(progress: Progress | None, group: int, groups: int) -> Progress | None:
    """Progress of one group of prompts, told as progress of all."""
    if progress is None:
        return None
    report = progress

    def shifted(done: int, total: int, **fields: float | str) -> None:
        report(group * total + done, groups * total, **fields)

    return shifted


def _describe(fused: FusedModel, prompt: str, tokens: Tensor, gates: Tensor) -> Generation:
    """Cut at the end-of-text token and turn ids into text."""
    end = fused.base.tokenizer.eos_token_id
    ids = [int(token) for token in tokens]
    is_finished = end in ids
    if is_finished:
        ids = ids[: ids.index(end) + 1]
    text = fused.base.tokenizer.decode(ids, skip_special_tokens=True)
    mean = gates[: len(ids)].mean(0)
    by_expert = {e.name: float(g) for e, g in zip(fused.experts, mean, strict=True)}
    return Generation(prompt, text, tuple(ids), is_finished, by_expert)


def decode_tokens(
    fused: FusedModel,
    prompt: Tensor,
    sampling: Sampling,
    *,
    streams: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue token ids of one length; the tensors behind `generate`.

    Args:
        fused: The fused model.
        prompt: Token ids, (B, P), integer.
        sampling: How tokens are chosen.
        streams: Number of each row's random stream; 0 .. B-1 if None.
        progress: Receives tokens done and tokens in all.

    Returns:
        New token ids (B, N), N <= max_new_tokens, and the gates that chose them (B, N, E). A row
        that ended goes on with end-of-text tokens; decoding stops when all have ended.

    Raises:
        ConfigError: If prompt and new tokens exceed the base's positions.
        RoutingError: If the router is not causal.
    """
    _check_can_decode(fused, prompt, sampling)
    prompt = prompt.to(device=fused.base.model.device, dtype=torch.long)
    generators = [make_generator(sampling.seed, s) for s in streams or range(len(prompt))]
    end = fused.base.tokenizer.eos_token_id
    is_held = sampling.evidence_from == "prompt" and "evidence" in fused.router.reads(
        fused.router.options
    )
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    chosen: list[Tensor] = []
    used: list[Tensor] = []
    with Runner(fused, cached=True) as runner:
        state = fused.router.init_state(len(prompt))
        starts = fused.find_document_starts(prompt)
        for at in range(0, prompt.shape[1], PREFILL_TOKENS):
            piece = runner.step(
                prompt[:, at : at + PREFILL_TOKENS], starts[:, at : at + PREFILL_TOKENS]
            )
            gates, state = fused.router.step(piece.view, state)
        while True:
            gates = gates[:, -1:]
            mixed = mix_distributions(piece.expert_logprob[:, :, -1:], gates, fused.mixture)[:, 0]
            token = choose_tokens(mixed, sampling, generators)
            token = torch.where(ended, torch.full_like(token, end), token)
            ended = ended | (token == end)
            chosen.append(token)
            used.append(gates)
            if progress is not None:
                progress(len(chosen), sampling.max_new_tokens)
            if len(chosen) == sampling.max_new_tokens or bool(ended.all()):
                break
            no_start = torch.zeros(len(token), 1, dtype=torch.bool, device=token.device)
            piece = runner.step(token.unsqueeze(1), no_start)
            if not is_held:
                gates, state = fused.router.step(piece.view, state)
    return torch.stack(chosen, dim=1), torch.cat(used, dim=1)


def _check_can_decode(fused: FusedModel, prompt: Tensor, sampling: Sampling) -> None:
    if not fused.router.causal:
        raise RoutingError(
            f"Cannot generate with router '{fused.router_name}': expected a causal router, got "
            "one that reads the future of a text. Fuse with another router."
        )
    check_length(fused.base, prompt, sampling)


def check_length(base: "Base", prompt: Tensor, sampling: Sampling) -> None:
    """Refuse to go beyond the base's positions.

    Raises:
        ConfigError: If prompt and new tokens exceed them.
    """
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    length = prompt.shape[1] + sampling.max_new_tokens
    if limit is not None and length > limit:
        raise ConfigError(
            f"Cannot generate after a prompt of {prompt.shape[1]} tokens: expected at most {limit} "
            f"tokens with the new ones, got {length}. Shorten the prompt or ask for fewer tokens."
        )


def make_generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each prompt, on the CPU, so that devices agree."""
    digest = hash_bytes(f"{seed}/{stream}".encode())
    return torch.Generator().manual_seed(int(digest[:15], 16))


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
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token is kept while those before it have not reached top_p: the first is always kept.
    kept = ordered.cumsum(-1) - ordered < sampling.top_p
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    return torch.zeros_like(probabilities).scatter(-1, index, ordered * kept)
