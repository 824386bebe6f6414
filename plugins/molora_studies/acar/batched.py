"""Sampling many prompts at once: those of equal length are rows of one batch.

A cascade reads every prompt alone, so that it repeats to the byte; a study that asks every model
everything would spend its time on batches of one. Seeds and generators are the cascade's, so the
samples are the same but for ties in the last bits.
"""

from collections.abc import Iterator, Sequence

import torch

from molora_fed.cascade.contract import Request, Sample
from molora_fed.inference.flops import count_cost
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.generate import Sampling, decode_tokens, make_generator, mark_start
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
    model: FusedForCausalLM,
    requests: Sequence[Request],
    progress: Progress | None = None,
) -> list[Sample]:
    """Answer requests of any prompts, each up to the end of its first line.

    Args:
        model: The model, of one token a byte.
        requests: What is asked.
        progress: Told how many are answered.

    Returns:
        A sample for each, in order; without times.
    """
    tokenizer, cost = model.tokenizer, count_cost(model)
    prompts = [tokenizer.encode(one.prompt, add_special_tokens=False) for one in requests]
    found: dict[int, Sample] = {}
    for places in _group([len(prompt) for prompt in prompts], requests):
        rows = torch.tensor([prompts[place] for place in places])
        written = _write(model, rows, [requests[place] for place in places])
        for place, (text, count) in zip(places, written, strict=True):
            length = len(prompts[place])
            found[place] = Sample(text, length, count, flops=cost.count(length, count))
        if progress is not None:
            progress(len(found), len(requests))
    return [found[place] for place in range(len(requests))]


def _write(
    model: FusedForCausalLM, prompts: torch.Tensor, requests: Sequence[Request]
) -> list[tuple[str, int]]:
    """Text and number of new tokens of every row, the stop counted and left out."""
    tokenizer, first = model.tokenizer, requests[0]
    stops = [tokenizer.eos_token_id, *tokenizer.encode(STOP, add_special_tokens=False)]
    ends = torch.tensor(stops)
    tokens, _ = decode_tokens(
        model,
        prompts,
        Sampling(first.max_new_tokens, first.temperature),
        generators=[make_generator(one.seed, 0) for one in requests],
        document_starts=mark_start(prompts),
        find_ended=lambda chosen: torch.isin(chosen, ends.to(chosen.device)),
    )
    written = []
    for row in tokens.tolist():
        over = next((at for at, token in enumerate(row) if token in stops), None)
        count = len(row) if over is None else over + 1
        written.append((tokenizer.decode(row[:over], skip_special_tokens=True), count))
    return written
