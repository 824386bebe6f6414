"""Tiny random models of five architectures, a byte tokenizer, random adapters, a text table."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from molora_fed.adapters.updates import Adapter, LinearUpdate
from molora_fed.charter import Charter
from molora_fed.models.base_files import quiet_transformers
from molora_fed.models.layout import adaptable_modules, bias_of, weight_of
from molora_fed.plugins import Plugins
from molora_fed.population.private_member import PrivateMember
from molora_fed.population.questions import (
    Answer,
    Question,
    load_answer,
    load_question,
    save_answer,
    save_question,
)
from molora_fed.storage.files import hash_bytes, replace_folder

__all__ = [
    "ARCHITECTURES",
    "Table",
    "build_random_adapter",
    "build_tiny_checkpoint",
    "build_tiny_model",
    "build_tiny_tokenizer",
]


END_OF_TEXT = "<|endoftext|>"
TINY_VOCABULARY = 257
"""256 bytes and the end-of-text token."""

_DEFAULT_DENSE = "delta"
_SIZES = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": TINY_VOCABULARY - 1,
    "eos_token_id": TINY_VOCABULARY - 1,
    # Larger than usual, so that logits of a random model differ enough to tell mistakes.
    "initializer_range": 0.15,
}


def _gated(**more: Any) -> dict[str, Any]:
    """Sizes of the architectures with grouped heads and a gated MLP."""
    return {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, **more}


def _build_gpt2() -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k != "hidden_size"}
    return GPT2Config(n_embd=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes)


_CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: GPTNeoXConfig(intermediate_size=48, **_SIZES),
    "llama": lambda: LlamaConfig(**_gated()),
    "qwen3": lambda: Qwen3Config(**_gated()),
    "gemma2": lambda: Gemma2Config(
        **_gated(
            query_pre_attn_scalar=8,
            final_logit_softcapping=5.0,
            attn_logit_softcapping=10.0,
            sliding_window=16,
            tie_word_embeddings=True,
            pad_token_id=None,
        )
    ),
    "gpt2": _build_gpt2,
}

ARCHITECTURES = tuple(_CONFIGS)
"""gpt_neox, llama, qwen3, gemma2 (soft-caps, tied head), gpt2 (Conv1D, tied head)."""


def build_tiny_model(architecture: str, seed: int = 0) -> Any:
    """Build a random causal language model of two blocks, hidden size 32, vocabulary 257.

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Seed of its weights.

    Returns:
        A transformers model in float32, in evaluation mode, with no parameter requiring gradients.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_CONFIGS[architecture]())
        with torch.no_grad():
            # Fresh biases are zero, which would hide mistakes with them.
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def build_tiny_tokenizer() -> Any:
    """Build a tokenizer with one token a byte, ids 0 to 255, and end-of-text, id 256."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab={**alphabet, END_OF_TEXT: len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def build_tiny_checkpoint(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Save a tiny model and tokenizer as a local Hugging Face checkpoint.

    Args:
        folder: Target, replaced.
        architecture: One of `ARCHITECTURES`.
        seed: Seed of the weights.

    Returns:
        `folder`.
    """
    with quiet_transformers(), replace_folder(folder) as target:
        build_tiny_model(architecture, seed).save_pretrained(target)
        build_tiny_tokenizer().save_pretrained(target)
    return folder


def build_random_adapter(
    model: Any,
    *,
    kind: str = "lora",
    rank: int = 4,
    seed: int = 0,
    frozen_depth: int = 0,
    strength: float = 0.3,
    name: str | None = None,
) -> Adapter:
    """Build an adapter with random numbers in memory; `save_adapter` writes it.

    Args:
        model: The base model.
        kind: "lora" or "svd" for low-rank updates, "delta" for dense ones with biases.
        rank: R of low-rank updates.
        seed: Seed of the numbers.
        frozen_depth: K; earlier blocks have no update.
        strength: Size of the change relative to the weight, by Frobenius norm.
        name: Name for errors; "<kind>-<seed>" by default.
    """
    generator = torch.Generator().manual_seed(seed)
    updates, is_dense = {}, kind == _DEFAULT_DENSE
    for module_name, module in adaptable_modules(model, frozen_depth).items():
        weight = weight_of(module).detach().float()
        rows, columns = weight.shape
        if is_dense:
            dense = torch.randn(rows, columns, generator=generator)
            dense *= strength * weight.norm() / dense.norm()
            has_bias = bias_of(module) is not None
            bias = 0.1 * torch.randn(rows, generator=generator) if has_bias else None
            updates[module_name] = LinearUpdate(dense=dense, bias=bias)
        else:
            a = torch.randn(rank, columns, generator=generator)
            b = torch.randn(rows, rank, generator=generator)
            b *= strength * weight.norm() / (b @ a).norm() * rank / 2.0
            updates[module_name] = LinearUpdate(a=a, b=b, scale=2.0 / rank)
    parts = [t for update in updates.values() for t in update.tensors().values()]
    return Adapter(
        name=name or f"{kind}-{seed}",
        kind=kind,
        frozen_depth=frozen_depth,
        updates=updates,
        hash=hash_bytes(b"".join(part.numpy().tobytes() for part in parts)),
        num_bytes=sum(part.nbytes for part in parts),
        targets=None if is_dense else tuple(updates),
    )


Read = TypeVar("Read")


class Table:
    """Asks contributors of this process; see `Ask`. What is said goes through folders.

    Args:
        folder: Where questions and answers lie.
        people: Contributors by name, in the order of their contributions.
        charter: The cooperative's charter.
        plugins: Where routers are registered.

    Attributes:
        asked: The kind of every question.
        answers: Every answer, as it was read.
    """

    def __init__(
        self,
        folder: Path,
        people: Mapping[str, PrivateMember],
        charter: Charter,
        plugins: Plugins,
    ) -> None:
        self._folder = folder
        self._people = people
        self._charter = charter
        self._plugins = plugins
        self.asked: list[str] = []
        self.answers: list[Answer] = []

    def __call__(self, question: Question, read: Callable[[Answer], Read]) -> list[Read]:
        """Ask one after the other."""
        rules = self._charter.identity.adapters
        router = self._charter.amendment.population.router
        self.asked.append(question.kind)
        save_question(question, router, self._folder / "question")
        found = []
        for name, person in self._people.items():
            arrived = load_question(self._folder / "question", rules=rules, plugins=self._plugins)
            place = self._folder / "answer"
            save_answer(person.answer(arrived), router, place)
            answer = load_answer(place, contributor=name, rules=rules, plugins=self._plugins)
            self.answers.append(answer)
            found.append(read(answer))
        return found
