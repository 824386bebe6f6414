"""What is served of one model: names for /v1/models, tokens of prompts, ends of texts."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora_fed.inference.fused_build import open_causal_lm
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.serving.requests import ApiError
from molora_fed.storage.compute import Compute
from molora_fed.storage.untrusted import clean

__all__ = ["ServedModel", "open_served"]


def open_served(
    folder: Path, *, base_folder: Path | None = None, compute: Compute | None = None
) -> FusedForCausalLM:
    """Open whatever model is in a folder, one that `save_pretrained` wrote, too.

    Args:
        folder: The folder.
        base_folder: Where its base is, if it is elsewhere than recorded.
        compute: Where to run, and in which dtype.

    Raises:
        MoloraError: Whatever opening it refuses.
    """
    if not folder.is_dir():  # transformers would take it for a name on the network
        return open_causal_lm(folder, base_folder=base_folder, compute=compute)
    compute = compute or Compute()
    chosen = {"dtype": compute.dtype, "device_map": compute.device}
    settings = {name: value for name, value in chosen.items() if value != "auto"}
    return FusedForCausalLM.from_pretrained(folder, base_folder=base_folder, **settings)


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
            RoutingError: If no tokenizer is beside it.
        """
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
        self.max_positions = model.max_positions
        self.ends = _find_ends(model)
        self.start = int(model.tokenizer.eos_token_id)
        # Tokenizers are not for several threads at once.
        self._tokenizer = copy.deepcopy(model.tokenizer)

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


def _find_ends(model: FusedForCausalLM) -> frozenset[int]:
    """The end-of-text token, and others that the base's settings of generation name."""
    source = model if model.base is None else model.base.model
    named = getattr(getattr(source, "generation_config", None), "eos_token_id", None)
    others = named if isinstance(named, list) else [named]
    ids = [model.tokenizer.eos_token_id, *others]
    return frozenset(int(one) for one in ids if one is not None)
