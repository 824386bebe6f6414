"""Text from an evolved model: the base runs beside the mixture, so that gates can read its states.

The router's gates are causal, so that those of a text's past never change; only the new positions
run through the mixture.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from molora_fed.bank.views import GateView
from molora_fed.inference.decoding import (
    PREFILL_TOKENS,
    Generation,
    Sampling,
    check_length,
    choose_tokens,
    make_generator,
)
from molora_fed.models.forward import Capture, capture_states, evaluating
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.mixture import Mixture
from molora_fed.types import Progress

__all__ = ["EvolvedRunner", "continue_tokens", "generate_evolved"]


class EvolvedRunner:
    """Runs base and mixture over a text piece by piece; open it with `with`.

    It leaves the base as it was.
    """

    def __init__(self, evolved: EvolvedModel, *, cached: bool = True) -> None:
        self._evolved = evolved
        self._model: Any = evolved.base.model
        self._cached = cached
        self._mixture = Mixture(self._model, evolved.population).to(self._model.device)
        self._reads = type(evolved.router).reads(evolved.router.options)
        self._caches: dict[str, Any] = {"base": None, "mixture": None}
        self._columns: dict[str, list[Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self._model))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def step(self, tokens: Tensor, document_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Read the next piece of text.

        Args:
            tokens: Token ids that follow what was read before, (B, t) int64.
            document_starts: True at a document's first token, (B, t) bool.

        Returns:
            Log-probabilities of the next token, (B, t, V) float32 nats, and gates, (B, t, P).
        """
        pieces = {"document_starts": document_starts}
        if "base_hidden" in self._reads:
            with capture_states(self._model, Capture(hidden=True)) as states:
                self._run("base", tokens)
                pieces["base_hidden"] = states["hidden"]
        if "embeddings" in self._reads:
            pieces["embeddings"] = self._model.get_input_embeddings().weight[tokens]
        for name, piece in pieces.items():
            self._columns.setdefault(name, []).append(piece)
        # Gates may rest on all of the past, a running mean of it, say.
        view = GateView(**{name: torch.cat(parts, 1) for name, parts in self._columns.items()})
        gates = self._evolved.router(view)[:, -tokens.shape[1] :]
        with self._mixture.mixed(gates):
            logits = self._run("mixture", tokens)
        return torch.log_softmax(logits.float(), dim=-1), gates

    def _run(self, which: str, tokens: Tensor) -> Tensor:
        output = self._model(
            input_ids=tokens, past_key_values=self._caches[which], use_cache=self._cached
        )
        self._caches[which] = output.past_key_values if self._cached else None
        logits: Tensor = output.logits
        return logits


def continue_tokens(
    evolved: EvolvedModel,
    prompt: Tensor,
    sampling: Sampling,
    *,
    stream: int = 0,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue one prompt; the tensors behind `generate_evolved`.

    Args:
        evolved: The model.
        prompt: Token ids, (1, n), integer.
        sampling: How tokens are chosen.
        stream: Number of the prompt's random stream.
        progress: Receives tokens done and tokens in all.

    Returns:
        New token ids (N,), the end-of-text token last if it came, and the gates under which each
        was chosen, (N, P).

    Raises:
        ConfigError: If prompt and new tokens exceed the base's positions.
    """
    check_length(evolved.base, prompt, sampling)
    prompt = prompt.to(device=evolved.base.model.device, dtype=torch.long)
    generator = make_generator(sampling.seed, stream)
    starts = evolved.find_document_starts(prompt)
    chosen: list[Tensor] = []
    used: list[Tensor] = []
    with EvolvedRunner(evolved) as runner:
        for at in range(0, prompt.shape[1], PREFILL_TOKENS):
            piece = slice(at, at + PREFILL_TOKENS)
            log_probs, gates = runner.step(prompt[:, piece], starts[:, piece])
        while True:
            token = choose_tokens(log_probs[:, -1], sampling, [generator])
            chosen.append(token)
            used.append(gates[:, -1])
            if progress is not None:
                progress(len(chosen), sampling.max_new_tokens)
            is_end = int(token) == evolved.base.tokenizer.eos_token_id
            if is_end or len(chosen) == sampling.max_new_tokens:
                break
            no_start = torch.zeros(1, 1, dtype=torch.bool, device=token.device)
            log_probs, gates = runner.step(token.unsqueeze(1), no_start)
    return torch.cat(chosen), torch.cat(used)


def generate_evolved(
    evolved: EvolvedModel,
    prompts: str | Sequence[str],
    sampling: Sampling | None = None,
    *,
    progress: Progress | None = None,
) -> list[Generation]:
    """Continue prompts, one after the other.

    Args:
        evolved: The model.
        prompts: One or several texts; an empty one starts a new document.
        sampling: How tokens are chosen; adapter routers read no evidence.
        progress: Receives tokens done and tokens in all, of each prompt in turn.

    Returns:
        One generation a prompt, in their order; gates by the id of the slot's adapter.

    Raises:
        ConfigError: If an option is out of range, or prompt and new tokens exceed the base's
            positions.
    """
    sampling = sampling or Sampling()
    tokenizer = evolved.base.tokenizer
    end = tokenizer.eos_token_id
    results = []
    for stream, text in enumerate([prompts] if isinstance(prompts, str) else prompts):
        ids = tokenizer.encode(text, add_special_tokens=False) or [end]
        tokens, gates = continue_tokens(
            evolved, torch.tensor([ids]), sampling, stream=stream, progress=progress
        )
        added = tuple(int(token) for token in tokens)
        mean = gates.mean(0).tolist()
        results.append(
            Generation(
                prompt=text,
                text=tokenizer.decode(list(added), skip_special_tokens=True),
                tokens=added,
                is_finished=added[-1] == end,
                gates=dict(zip(evolved.slot_names, mean, strict=True)),
            )
        )
    return results
