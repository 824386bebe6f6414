"""The models of the study `acar`: bytes in, bytes out, trained on solved problems.

Answers are what counts: their tokens weigh 1 in the loss, those of prompts less, since most of a
prompt is chance.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from molora_acar.tasks.families import FAMILIES
from molora_acar.tasks.problems import Problem
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from molora_fed.adapters.contract import open_kind
from molora_fed.adapters.files import load_adapter
from molora_fed.charter import AdapterRules
from molora_fed.corpus.batches import choose_rows
from molora_fed.models.base import load_base
from molora_fed.models.base_files import quiet_transformers
from molora_fed.models.runtime import limit_threads
from molora_fed.plugins import get_plugins
from molora_fed.storage.files import replace_folder, storage_errors
from molora_fed.training.loop import TrainingJob, build_optimizer, run_training
from molora_fed.types import Progress
from molora_studies.acar.recipe import ModelSettings, TrainingSettings
from molora_studies.framework.contract import TaskContext

__all__ = [
    "STOP",
    "build_tokenizer",
    "draw_training_problems",
    "make_checkpoint",
    "pack_problems",
    "train_member",
    "train_on_answers",
]

STOP = "\n"
"""Ends every answer."""

POSITIONS = 256
_END_OF_TEXT = "<|endoftext|>"
_WARMUP = 0.1
_UNLIMITED = 2**62


def build_tokenizer() -> Any:
    """A token for each byte, and the end of a text, 257 in all."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab={**alphabet, _END_OF_TEXT: len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_END_OF_TEXT, eos_token=_END_OF_TEXT
    )


def _build_model(settings: ModelSettings, seed: int) -> Any:
    config = GPTNeoXConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden,
        max_position_embeddings=POSITIONS,
        rotary_pct=1.0,  # heads of a few numbers: all of them say where a token is
        initializer_range=settings.init_std,
        bos_token_id=len(build_tokenizer()) - 1,
        eos_token_id=len(build_tokenizer()) - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config)


def draw_training_problems(
    settings: TrainingSettings, levels: Mapping[str, Sequence[int]], seed: int
) -> list[Problem]:
    """Solved problems of the train split in a random order, families by weight.

    Args:
        settings: Families and how many problems.
        levels: Levels of each family.
        seed: Seed.
    """
    heaviest = max(settings.families.values())
    drawn: list[Problem] = []
    for name, weight in sorted(settings.families.items()):
        share = settings.problems * weight / heaviest / len(levels[name])
        for level in levels[name]:
            drawn.extend(FAMILIES[name].draw(level, math.ceil(share), seed, "train"))
    random.Random(seed).shuffle(drawn)
    return drawn


def _list_tokens(tokenizer: Any) -> list[int]:
    """Token of each byte: much faster than the tokenizer on very many short texts."""
    names = bytes_to_unicode()  # the same table as the tokenizer's own
    return [int(tokenizer.convert_tokens_to_ids(names[byte])) for byte in range(256)]


def pack_problems(
    problems: Sequence[Problem], tokenizer: Any, *, block_size: int, prompt_weight: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Problems one after the other in blocks; the rest of a block is line ends of weight 0.

    Args:
        problems: Each shorter than a block.
        tokenizer: Of bytes.
        block_size: T.
        prompt_weight: Weight of a prompt's tokens.

    Returns:
        Tokens (N, T) and their weights (N, T): 1 for an answer's, its end included.
    """
    table = _list_tokens(tokenizer)
    prompts = ([table[byte] for byte in one.prompt.encode()] for one in problems)
    answers = ([table[byte] for byte in (one.solution + STOP).encode()] for one in problems)
    end = table[ord(STOP)]
    rows: list[list[int]] = [[]]
    weights: list[list[float]] = [[]]
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(rows[-1]) + len(prompt) + len(answer) > block_size:
            rows.append([])
            weights.append([])
        rows[-1] += prompt + answer
        weights[-1] += [prompt_weight] * len(prompt) + [1.0] * len(answer)
    tokens = np.full((len(rows), block_size), end, dtype=np.int32)
    weighed = np.zeros((len(rows), block_size), dtype=np.float32)
    for place, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        tokens[place, : len(row)] = row
        weighed[place, : len(row)] = weight
    return tokens, weighed


def _compute_rate(step: int, settings: TrainingSettings) -> float:
    """Rate of a step (from 0): linear warm-up, then a cosine down to 0."""
    warmup = max(1, round(_WARMUP * settings.steps))
    share = max(0, step - warmup) / max(1, settings.steps - warmup)
    rising = min(1.0, (step + 1) / warmup)
    return settings.learning_rate * rising * 0.5 * (1.0 + math.cos(math.pi * share))


def train_on_answers(
    model: Any,
    parameters: Sequence[nn.Parameter],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
    settings: TrainingSettings,
    *,
    seed: int,
    progress: Progress | None = None,
) -> float:
    """Train a model on weighed tokens.

    Args:
        model: A causal language model; left in eval mode.
        parameters: The ones to train.
        tokens: Blocks (N, T).
        weights: Weight of each token in the loss, (N, T).
        settings: Steps, batch, rate.
        seed: Of the order of blocks.
        progress: Told the step with the loss.

    Returns:
        Mean loss of the last tenth of the steps, nats per unit of weight.
    """
    optimizer = build_optimizer(parameters, learning_rate=settings.learning_rate)
    losses: list[float] = []

    def compute_loss(step: int) -> Iterator[torch.Tensor]:
        rows = choose_rows(len(tokens), step, batch=settings.batch, seed=seed)
        batch = torch.from_numpy(tokens[rows]).long()
        weight = torch.from_numpy(weights[rows])[:, 1:].flatten()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (B, T - 1, V)
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        loss = (each * weight).sum() / weight.sum()
        losses.append(float(loss.detach()))
        yield loss

    job = TrainingJob(
        parameters=[parameters],
        optimizer=optimizer,
        rates=lambda step: [_compute_rate(step, settings)] * len(optimizer.param_groups),
        loss=compute_loss,
        validate=None,
        steps=settings.steps,
        save_every=settings.steps,
        identity={},
        describe=lambda step: {},
        threads=torch.get_num_threads(),
    )
    model.train()
    with TemporaryDirectory(prefix="molora-acar-") as folder:
        run_training(job, Path(folder), progress)
    model.eval()
    return float(np.mean(losses[-max(1, settings.steps // 10) :]))


def _train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    settings: Mapping[str, Any],
    context: TaskContext,
) -> dict[str, Any]:
    training = TrainingSettings.model_validate(settings["training"])
    problems = draw_training_problems(training, settings["levels"], settings["seed"])
    tokens, weights = pack_problems(
        problems,
        build_tokenizer(),
        block_size=training.block_size,
        prompt_weight=training.prompt_weight,
    )
    with limit_threads(context.threads):
        loss = train_on_answers(
            model,
            parameters,
            tokens,
            weights,
            training,
            seed=settings["seed"],
            progress=context.progress,
        )
    return {"loss": loss, "problems": len(problems), "blocks": len(tokens)}


def make_checkpoint(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train a model from scratch into `base/`; see `recipe.plan_base`.

    A killed one starts again: it takes a minute or two.
    """
    model = _build_model(ModelSettings.model_validate(settings["model"]), settings["seed"])
    found = _train(model, list(model.parameters()), settings, context)
    target = context.folder / "base"
    with replace_folder(target) as folder, storage_errors(folder), quiet_transformers():
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**found, "parameters": parameters, "weights": load_base(target).weights}


def train_member(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train a specialist of the base into `adapter/`; see `recipe.plan_specialists`."""
    base = load_base(context.needs[0].folder / "base")
    kind = open_kind(settings["kind"], {}, get_plugins())
    rules = AdapterRules(kinds=(settings["kind"],), max_bytes=_UNLIMITED)
    model, parameters = kind.prepare(base.model, rules, rules.max_rank, seed=settings["seed"])
    found = _train(model, parameters, settings, context)
    target: Path = context.folder / "adapter"
    kind.export(model, base.model, target, rules.max_rank, rules, base_weights=base.weights)
    adapter = load_adapter(target, plugins=get_plugins(), name=context.folder.name)
    return {**found, "adapter_hash": adapter.hash, "adapter_bytes": adapter.num_bytes}
