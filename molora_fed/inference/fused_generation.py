"""What a fused model does otherwise than any model when it generates: prompts are read whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin

from molora_fed.errors import RoutingError
from molora_fed.inference.expert_pass import ExpertPass, Piece
from molora_fed.inference.fused_cache import FusedCache, check_fused_cache
from molora_fed.inference.fused_config import FusedConfig
from molora_fed.inference.mixing import Mixer, OutputMixer
from molora_fed.types import ExpertsPerText

__all__ = ["FusedGenerationMixin"]


class FusedGenerationMixin(GenerationMixin):
    """Generation of `FusedForCausalLM`, by transformers' loop.

    A cache must hold what the texts begin with; experts are chosen once, at a prompt's end.
    """

    config: FusedConfig
    make_cache: Callable[[], FusedCache]
    _alone: Tensor | None
    _mixer: Mixer
    _pass: ExpertPass
    _prepare: Callable[..., Piece]
    _reads: frozenset[str]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise RoutingError(
                    "Cannot generate: expected no cache implementation, got "
                    f"'{generation_config.cache_implementation}'. A fused model keeps its own."
                )
            model_kwargs["past_key_values"] = self.make_cache()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: FusedCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        evidence_from: str = "all",
        experts_per_text: ExpertsPerText | None = None,
        document_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See transformers; what was read must be what the texts begin with.

        Args:
            input_ids: The whole texts, (B, T); at first a piece of them.
            next_sequence_length: How many of the tokens are new; see transformers.
            past_key_values: What was read before.
            attention_mask: 1 where there is text, (B, T) of the whole texts.
            is_first_iteration: Whether nothing was generated yet.
            evidence_from: With "prompt", a router that reads evidence keeps the gates it had after
                the prompt; with "all" it goes on learning from what is generated.
            experts_per_text: How many of the best experts at a prompt's end go on with its text,
                their gates kept and renormalised, see `FusedCache.narrow`; with "merged" one model
                for each text goes on, the experts' changes merged by the gates at the prompt's
                end, see `FusedCache.merge`; all experts if None.
            document_starts: True at a document's first token of the prompts, (B, P); see `forward`.
            kwargs: See `forward`.

        Raises:
            RoutingError: If a cache is another's or of other texts, or a setting cannot be.
        """
        self._check_settings(evidence_from, experts_per_text, past_key_values)
        if past_key_values is not None:
            if not is_first_iteration:
                past_key_values.check_prefix(input_ids)
                if experts_per_text is not None:
                    past_key_values.decide(experts_per_text)
                if evidence_from == "prompt" and "evidence" in self._reads:
                    past_key_values.hold()
            if document_starts is not None:
                read = past_key_values.get_seq_length()
                count = next_sequence_length or input_ids.shape[1]
                document_starts = document_starts[:, read : read + count]
                if not document_starts.shape[1]:
                    document_starts = None
        elif document_starts is not None and not is_first_iteration:
            raise RoutingError(
                "Cannot generate: expected a cache with document_starts, got use_cache=False. "
                "Use the cache."
            )
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        prepared["document_starts"] = document_starts
        return prepared

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """See transformers; the whole prompts are needed, and go on with what a cache has read."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_fused_cache(cache)
            cache.check_prefix(input_ids)
            experts = model_kwargs.get("experts_per_text")
            if experts is not None and cache.tokens is None and model_kwargs.get("gates") is None:
                self._choose_experts(input_ids, cache, experts, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    @torch.no_grad()
    def _choose_experts(
        self,
        tokens: Tensor,
        cache: FusedCache,
        experts: ExpertsPerText,
        given: dict[str, Any],
    ) -> None:
        """Choose each prompt's experts before any of them runs, where the base's states decide."""
        mixer = self._mixer
        if (
            not isinstance(mixer, OutputMixer)
            or not mixer.reads_base_alone
            or self._alone is not None
        ):
            return
        self._check_settings("all", experts, cache)
        mask, starts = given.get("attention_mask"), given.get("document_starts")
        piece = self._prepare(tokens, mask, None, None, 1, starts)
        if not self._pass.is_laid_out:
            self._pass.lay_out()
        gates = mixer.compute_base_gates(piece)
        if experts == "merged":
            cache.merge(gates)
        else:
            cache.choose(gates, experts)

    def check_experts_per_text(self, experts: ExpertsPerText | None) -> None:
        """Refuse a way to go on after a prompt that there is not.

        Args:
            experts: See `prepare_inputs_for_generation`.

        Raises:
            RoutingError: If it is no number from 1 on and not "merged", or the model's experts are
                a population, which one row mixes in any case.
        """
        if isinstance(experts, str) and experts != "merged":
            raise _build_refusal("experts_per_text as a number or 'merged'", repr(experts))
        if isinstance(experts, int) and experts < 1:
            raise _build_refusal("experts_per_text of at least 1", str(experts))
        if experts is not None and self.config.mixes == "updates":
            raise _build_refusal(
                "a model that mixes distributions", "experts_per_text of a population"
            )

    def _check_settings(
        self, evidence_from: str, experts: ExpertsPerText | None, cache: Any
    ) -> None:
        """Refuse settings of generation that cannot be."""
        if evidence_from not in ("prompt", "all"):
            raise _build_refusal("evidence_from 'prompt' or 'all'", repr(evidence_from))
        self.check_experts_per_text(experts)
        if cache is None and (experts is not None or evidence_from == "prompt"):
            raise _build_refusal(
                "a cache with experts_per_text or evidence_from", "use_cache=False"
            )


def _build_refusal(expected: str, got: str) -> RoutingError:
    return RoutingError(f"Cannot generate: expected {expected}, got {got}. Correct these settings.")
