"""transformers' own tests of causal language models, run on `FusedForCausalLM`.

`make transformers-tests` fetches the mixins and runs this file beside them; alone it has nothing to
import.
"""

import unittest
from typing import Any

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from transformers import LlamaConfig

from molora_fed.inference.fused_config import FusedConfig
from molora_fed.inference.fused_lm import FusedForCausalLM

EXPERTS = 3


def describe(base: Any, linear: tuple[str, ...]) -> FusedConfig:
    """Three experts of unequal ranks, one of them dense in places, and a router of evidence."""
    ranks = (2, None, 3)
    return FusedConfig(
        base_config=base.to_dict(),
        experts=[{"name": name} for name in ("one", "base", "two")],
        layers={
            name.format(block): {"ranks": [*ranks], "biases": False}
            for block in range(base.num_hidden_layers)
            for name in linear
        },
        router={
            "name": "evidence",
            "options": {},
            "top_k": None,
            "shapes": {"weights": [EXPERTS], "prior": [EXPERTS]},
        },
        document_end=base.eos_token_id,
    )


class Tester:
    """What the mixins ask of a model's tester."""

    batch_size = 2
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 37
    num_hidden_layers = 2
    num_attention_heads = 2
    max_position_embeddings = 512
    is_training = False

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> FusedConfig:
        return describe(
            LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_attention_heads,
                max_position_embeddings=self.max_position_embeddings,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            ),
            ("model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"),
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FusedConfig, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size - 3) + 3,
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        return self.get_config(), inputs


class FusedTest(ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (FusedForCausalLM,)
    all_generative_model_classes = (FusedForCausalLM,)
    pipeline_model_mapping = {"text-generation": FusedForCausalLM}

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=FusedConfig, has_text_modality=False)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
