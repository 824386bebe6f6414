"""Sampling many prompts at once: those of equal length are rows of one batch.

A cascade reads every prompt alone, so that it repeats to the byte; a study that asks every model
everything would spend its time on batches of one. Seeds and generators are the cascade's, so the
samples are the same but for ties in the last bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from molora_fed.cascade.contract import Request, Sample
from molora_fed.inference.decoding import Sampling, choose_tokens, make_generator
from molora_fed.inference.engines import PlainEngine
from molora_fed.models.base import Base
from molora_fed.types import Progress
from molora_studies.acar.models import STOP

__all__ = ["sample_in_batches"]

MAX_ROWS = 192


def _group(lengths: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
    """Places of requests that can be one batch."""
    groups: dict[tuple[int, float, int], list[int]] = {}
    for place, (length, one) in enumerate(zip(lengths, requests, strict=True)):
        groups.setdefault((length, one.temperature, one.max_new_tokens), []).append(place)
    for places in groups.values():
        for at in range(0, len(places), MAX_ROWS):
            yield places[at : at + MAX_ROWS]


def sample_in_batches(
    engine: PlainEngine,
    base: Base,
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> list[Sample]:
    """Answer requests of any prompts, each up to the end of its first line.

    Args:
        engine: The model.
        base: Its tokenizer counts, one token a byte.
        requests: What is asked.
        progress: Told how many are answered.

    Returns:
        A sample for each, in order; without times.
    """
    prompts = [base.tokenizer.encode(one.prompt, add_special_tokens=False) for one in requests]
    found: dict[int, Sample] = {}
    for places in _group([len(prompt) for prompt in prompts], requests):
        rows = torch.tensor([prompts[place] for place in places])
        written = _write(engine, base, rows, [requests[place] for place in places])
        for place, (text, count) in zip(places, written, strict=True):
            length = len(prompts[place])
            found[place] = Sample(text, length, count, flops=engine.cost.count(length, count))
        if progress is not None:
            progress(len(found), len(requests))
    return [found[place] for place in range(len(requests))]


def _write(
    engine: PlainEngine, base: Base, prompts: Any, requests: Sequence[Request]
) -> list[tuple[str, int]]:
    """Text and number of new tokens of every row, the stop counted and left out."""
    tokenizer, first = base.tokenizer, requests[0]
    ends = {tokenizer.eos_token_id, *tokenizer.encode(STOP, add_special_tokens=False)}
    sampling = Sampling(first.max_new_tokens, first.temperature)
    generators = [make_generator(one.seed, 0) for one in requests]
    rows: list[list[int]] = [[] for _ in requests]
    is_over = [False] * len(rows)
    with engine.reading(len(rows)) as step:
        log_probs = step(prompts)[:, -1]
        for left in reversed(range(first.max_new_tokens)):
            chosen = choose_tokens(log_probs, sampling, generators)
            for place, token in enumerate(chosen.tolist()):
                if not is_over[place]:
                    rows[place].append(token)
                    is_over[place] = token in ends
            if not left or all(is_over):
                break
            log_probs = step(chosen.unsqueeze(1))[:, -1]
    return [
        (tokenizer.decode(row[:-1] if over else row, skip_special_tokens=True), len(row))
        for row, over in zip(rows, is_over, strict=True)
    ]
