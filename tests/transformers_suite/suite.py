"""transformers' own tests of causal language models, run on `FusedForCausalLM`.

`make transformers-tests` fetches the mixins and runs this file beside them; alone it has nothing to
import. See docs/results/transformers_tests.md.
"""

import unittest
from typing import Any, ClassVar

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers import GPT2Config, LlamaConfig

from molora_fed.inference.fused_config import FusedConfig
from molora_fed.inference.fused_lm import FusedForCausalLM, FusedOutput

VOCABULARY = 99
END = 2

_STATES = "every expert has attentions and hidden states of its own; the model gives its gates"
_FIXED = "experts are trained on one vocabulary, which stays as it is"
NOT_APPLICABLE = {
    "test_attention_outputs": _STATES,
    "test_hidden_states_output": _STATES,
    "test_retain_grad_hidden_states_attentions": _STATES,
    "test_resize_tokens_embeddings": _FIXED,
    "test_resize_embeddings_untied": _FIXED,
    "test_resize_embeddings_untied_no_reinit_on_post_init": _FIXED,
    "test_model_get_set_embeddings": "layers are ExpertLinear, also where GPT-2 has Conv1D",
    "test_all_tensors_are_parameter_or_buffer": "weights are read or copied in, never drawn",
    "test_correct_missing_keys": "a folder with the base alone opens as the base",
    "test_tied_weights_keys": "it ties by the outer configuration; the base's own says so (GPT-2)",
}


class Tested(FusedForCausalLM):
    """Answers for hidden states with its log-probabilities: transformers' tests compare those."""

    def forward(self, *args: Any, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output_hidden_states and isinstance(output, FusedOutput):
            output["hidden_states"] = (output.logits,)
        return output


class Tester:
    """What the mixins ask of a model's tester."""

    batch_size = 2
    seq_length = 7
    vocab_size = VOCABULARY
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = False
    base = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    changed: tuple[str, ...] = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj")

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> FusedConfig:
        """Three experts of unequal ranks, one of them the base, and a router of evidence."""
        return FusedConfig(
            base_config=self.base.to_dict(),
            experts=[{"name": name} for name in ("one", "base", "two")],
            layers={
                name.format(block): {"ranks": [2, None, 3], "biases": False}
                for block in range(self.num_hidden_layers)
                for name in self.changed
            },
            router={
                "name": "evidence",
                "options": {},
                "top_k": None,
                "shapes": {"weights": [3], "prior": [3]},
            },
            document_end=END,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FusedConfig, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size - 3) + 3,
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        return self.get_config(), inputs


class GPT2Tester(Tester):
    """The same on GPT-2: Conv1D layers and a head tied to the embeddings."""

    base = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    changed = ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc")


class FusedTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_tester_class: ClassVar[type[Tester]] = Tester

    def setUp(self) -> None:
        self.has_attentions = "dict_output" not in self._testMethodName
        is_compared = "eager_matches_sdpa_inference" in self._testMethodName
        asks = is_compared or not self.has_attentions
        self.all_model_classes = (Tested if asks else FusedForCausalLM,)
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(self, config_class=FusedConfig, has_text_modality=False)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _check_hidden_states_for_generate(self, *_: Any, **__: Any) -> None:
        """They are log-probabilities here."""

    def _check_past_key_values_for_generate(
        self, batch_size: int, *others: Any, **named: Any
    ) -> None:
        """Keys and values have a row for every expert and text."""
        experts = len(self.model_tester.get_config().experts)
        super()._check_past_key_values_for_generate(batch_size * experts, *others, **named)


class FusedGPT2Test(FusedTest):
    model_tester_class = GPT2Tester


def _leave_out(case: type[unittest.TestCase], *kept: str) -> None:
    for name, reason in NOT_APPLICABLE.items():
        if name not in kept:
            setattr(case, name, unittest.skip(reason)(getattr(case, name)))


_leave_out(FusedTest)
_leave_out(FusedGPT2Test, "test_tied_weights_keys")
