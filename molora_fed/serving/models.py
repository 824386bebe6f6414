"""What is served of one model: names for /v1/models, tokens of prompts, ends of texts."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from molora_fed.errors import ConfigError
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.models.base import Base
from molora_fed.serving.requests import ApiError
from molora_fed.storage.untrusted import clean

__all__ = ["ServedModel"]


class ServedModel:
    """A model and its members by the names that requests use.

    Attributes:
        name: Of the model itself: "fused", "evolved", the specialist's, or "base".
        experts: Names of the experts as they are shown, in the order of the gates.
        gates: Gates of each name, (E,); None where the router decides.
        max_positions: Tokens of the longest text; None if there is no limit.
        ends: Tokens that end a text.
    """

    def __init__(self, model: FusedForCausalLM) -> None:
        """Take a model.

        Raises:
            ConfigError: If its tokenizer is not known.
        """
        if model.base is None:
            raise ConfigError(
                "Cannot serve the model: expected a tokenizer with it, got none. Save the model "
                "with its tokenizer."
            )
        base: Base = model.base
        self.experts = _distinguish([clean(name, 100) for name in model.expert_names])
        is_mixture = model.config.mixes == "updates"
        self.gates: dict[str, Tensor | None] = {}
        count = len(self.experts)
        if count > 1 or is_mixture:
            self.name = "evolved" if is_mixture else "fused"
            self.gates[self.name] = None
            for index, name in enumerate(self.experts):
                one = torch.nn.functional.one_hot(torch.tensor(index), count).float()
                self.gates[f"expert:{name}" if name in self.gates else name] = one
            if is_mixture and "base" not in self.gates:
                self.gates["base"] = torch.zeros(count)  # no change at all
        else:
            self.name = self.experts[0]
            self.gates[self.name] = None
        self.max_positions = base.max_positions
        self.ends = _find_ends(base)
        self.start = int(base.tokenizer.eos_token_id)
        # Tokenizers are not for several threads at once.
        self._tokenizer = copy.deepcopy(base.tokenizer)

    def copy_tokenizer(self) -> Any:
        """A tokenizer for another thread."""
        return copy.deepcopy(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether the base says how chats are written."""
        return bool(self._tokenizer.chat_template)

    def find_gates(self, name: str) -> Tensor | None:
        """Gates of a name, (E,); None where the router decides.

        Raises:
            ApiError: If nothing has this name.
        """
        if name not in self.gates:
            raise ApiError(
                404,
                f"The model '{clean(name, 100)}' does not exist. /v1/models lists what does.",
                param="model",
                code="model_not_found",
            )
        return self.gates[name]

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Ids of a prompt; an empty one begins a document.

        Raises:
            ApiError: If an id is not one of the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special_tokens=False)
            return tuple(ids) or (self.start,)
        size = len(self._tokenizer)
        if max(prompt) >= size:
            raise ApiError(
                400,
                f"Parameter 'prompt': expected token ids below {size}.",
                param="prompt",
                code="invalid_value",
            )
        return tuple(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Ids of a chat, up to where the answer begins.

        Raises:
            ApiError: If there is no chat template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise ApiError(
                400,
                "This base has no chat template. Use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates are programs of the base's authors
            raise ApiError(
                400,
                f"The base's chat template refuses these messages: {clean(error)}",
                param="messages",
                code="invalid_value",
            ) from None
        return self.encode(text)

    def decode_token(self, token: int) -> str:
        """A token's text, special ones too."""
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


def _distinguish(names: Sequence[str]) -> tuple[str, ...]:
    """Names that differ; the second of two equal ones gets a number."""
    found: list[str] = []
    for name in names:
        number, shown = 1, name
        while shown in found:
            number += 1
            shown = f"{name}-{number}"
        found.append(shown)
    return tuple(found)


def _find_ends(base: Base) -> frozenset[int]:
    """The end-of-text token, and others that the base's settings of generation name."""
    settings = getattr(base.model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    others = named if isinstance(named, list) else [named]
    return frozenset(
        {int(base.tokenizer.eos_token_id), *(int(one) for one in others if one is not None)}
    )
