"""Names that are served, and whose text each of them is."""

import pytest
import torch
from adaptation_helpers import build_population, build_router
from fused_helpers import NoncausalRouter, build_fused, random_tokens

from molora_fed.errors import ConfigError, RoutingError
from molora_fed.inference.fused_build import build_causal_lm, open_causal_lm
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import load_base
from molora_fed.population.bundle import EvolvedModel
from molora_fed.serving.batch import RunningBatch
from molora_fed.serving.chat import Chat
from molora_fed.serving.models import ServedModel, open_served


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint("gpt_neox"))


def read_after(model, tokens, gates):
    batch = RunningBatch(model)
    return batch.read_on(batch.begin(tokens, gates)).log_probs


@pytest.fixture(scope="module")
def evolved(base):
    router = build_router()
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.manual_seed(3)))
    population = build_population(base)
    return build_causal_lm(EvolvedModel(base, population, router.eval(), "parallel-sigmoid"))


def test_a_population_serves_itself_its_slots_and_the_base_without_them(base, evolved):
    served = ServedModel(evolved)
    assert served.name == "evolved"
    assert list(served.gates) == ["evolved", *served.experts, "base"]
    tokens = random_tokens(1, 9)[0].tolist()
    said = {name: read_after(evolved, tokens, gates) for name, gates in served.gates.items()}
    alone = read_after(build_causal_lm(PlainModel(base)), tokens, None)
    torch.testing.assert_close(said["base"], alone, atol=2e-4, rtol=0)
    for name in ("evolved", served.experts[0]):  # the other slots are fresh
        assert (said[name] - alone).abs().max() > 1e-2


def test_names_that_are_taken_or_would_move_a_cursor(base):
    model = build_causal_lm(build_fused(base))
    model.expert_names = ("fused", "a\x1b[2Jb", "a\x1b[2Jb")
    served = ServedModel(model)
    shown = "a\N{REPLACEMENT CHARACTER}[2Jb"
    assert list(served.gates) == ["fused", "expert:fused", shown, f"{shown}-2"]
    assert served.gates["expert:fused"].tolist() == [1.0, 0.0, 0.0]


def test_what_was_saved_is_served(base, tiny_checkpoint, tmp_path):
    model = build_causal_lm(build_fused(base, kinds=("lora", None)))
    tokens = random_tokens(1, 7)[0].tolist()
    expected = read_after(model, tokens, torch.tensor([1.0, 0.0]))
    assert ServedModel(open_served(tiny_checkpoint("gpt_neox"))).name == "base"
    with pytest.raises(ConfigError, match="Cannot open a model in"):
        open_served(tmp_path / "none")
    plain = open_causal_lm(tiny_checkpoint("gpt_neox"))
    plain.save_pretrained(tmp_path / "saved")
    again = open_served(tmp_path / "saved")
    torch.testing.assert_close(
        read_after(again, tokens, None), read_after(plain, tokens, None), atol=1e-5, rtol=0
    )
    assert (read_after(again, tokens, None) - expected).abs().max() > 1e-2


def test_a_router_that_reads_the_future_is_not_served(base):
    fused = build_fused(base)
    router = NoncausalRouter.build(3, base.hidden_size, ("evidence",))
    object.__setattr__(fused, "router", router)
    with pytest.raises(RoutingError, match="reads the future"):
        RunningBatch(build_causal_lm(fused))


def test_a_chat_keeps_its_turns_and_its_room(base):
    talk = Chat(build_causal_lm(PlainModel(base)), max_new_tokens=6, temperature=0)
    try:
        first = "".join(talk.answer("abc"))
        second = "".join(talk.answer("def"))
        talk.reset()
        assert "".join(talk.answer(f"abc{first}def")) == second
        assert talk.gates == {"base": 1.0}
        for _ in range(3):
            list(talk.answer("x" * 50))
        assert talk.forgotten == 4
        with pytest.raises(ConfigError, match="expected at most 128 tokens"):
            list(talk.answer("x" * 200))
        # The one that was refused is no turn.
        list(talk.answer("y"))
        assert talk.forgotten < 8
    finally:
        talk.close()


def test_an_answer_that_is_left_keeps_what_was_said(base):
    talk = Chat(build_causal_lm(PlainModel(base)), max_new_tokens=60, temperature=0)
    try:
        pieces = talk.answer("abc")
        said = next(pieces)
        pieces.close()
        assert talk._turns[-1] == {"role": "assistant", "content": said}
    finally:
        talk.close()
