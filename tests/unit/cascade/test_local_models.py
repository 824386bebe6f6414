from dataclasses import replace

import pytest
import torch
from molora_evolution.routers import ParallelSigmoidOptions, ParallelSigmoidRouter
from molora_kalavai.evidence import ZeroTrainingEvidenceRouter
from molora_kalavai.uniform import UniformRouter
from torch.utils.flop_counter import FlopCounterMode

from molora_fed.adapters.compatibility import applied
from molora_fed.cascade.contract import CountsScoring, Request, Scorer
from molora_fed.cascade.local import LocalModel
from molora_fed.errors import RoutingError
from molora_fed.inference.expert_layers import share_weights
from molora_fed.inference.flops import count_cost
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.fused_config import FusedConfig
from molora_fed.inference.fused_lm import FusedForCausalLM
from molora_fed.inference.generate import Sampling, generate
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import load_base
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.slots import make_population
from molora_fed.routing.contract import RouterOptions
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.testing.models import build_random_adapter

PROMPT = "two and two"


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def adapters(base):
    return [build_random_adapter(base.model, rank=2 + seed, seed=seed) for seed in range(2)]


def build_fused(base, adapters, router_class=ZeroTrainingEvidenceRouter, options=None):
    experts = (FusedExpert("base", None), *(FusedExpert(a.name, a, "d", "id") for a in adapters))
    router = router_class(len(experts), options or router_class.Options(), {})
    return FusedModel(base, experts, router, "evidence-zero", "probability", 0)


def build_evolved(base, adapters):
    named = [(adapter.name, "d", adapter) for adapter in adapters]
    population = make_population(base, named, num_slots=2, seed=1)
    options = ParallelSigmoidOptions()
    router = ParallelSigmoidRouter.build(2, base.hidden_size, options, 0).eval()
    return EvolvedModel(base, population, router, "parallel-sigmoid")


def open_local(model, name="model"):
    return LocalModel(name, build_causal_lm(model))


@pytest.fixture(scope="module")
def models(base, adapters):
    return {
        "base": open_local(PlainModel(base)),
        "specialist": open_local(PlainModel(base, adapters[0])),
        "fused": open_local(build_fused(base, adapters)),
        "evolved": open_local(build_evolved(base, adapters)),
    }


KINDS = ("base", "specialist", "fused", "evolved")


def requests(*seeds, **more):
    return [
        Request(PROMPT, seed, **{"max_new_tokens": 6, "temperature": 1.0, **more}) for seed in seeds
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_requests_give_the_same_samples(models, kind):
    first, second = (models[kind].sample(requests(1, 2, 3)) for _ in range(2))
    assert [one.text for one in first] == [one.text for one in second]
    assert len({one.text for one in first}) > 1
    assert all(one.flops > 0 and one.prompt_tokens == len(PROMPT) for one in first)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_follows_from_its_own_seed(models, kind):
    together = models[kind].sample(requests(1, 2, 3))
    alone = [models[kind].sample(requests(seed))[0] for seed in (1, 2, 3)]
    assert [one.text for one in together] == [one.text for one in alone]


def test_greedy_text_is_that_of_generate(base, adapters, models):
    (sample,) = models["fused"].sample(requests(0, temperature=0.0))
    (expected,) = generate(build_causal_lm(build_fused(base, adapters)), PROMPT, Sampling(6))
    assert sample.text == expected.text and sample.new_tokens == len(expected.tokens)
    (sample,) = models["evolved"].sample(requests(0, temperature=0.0))
    (expected,) = generate(build_causal_lm(build_evolved(base, adapters)), PROMPT, Sampling(6))
    assert sample.text == expected.text


def test_a_specialist_is_the_base_with_its_adapter(base, adapters, models):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    (sample,) = models["specialist"].sample(requests(0, temperature=0.0))
    with applied(base.model, adapters[0]):
        (expected,) = open_local(PlainModel(base)).sample(requests(0, temperature=0.0))
    assert sample.text == expected.text
    assert all(torch.equal(before[name], one) for name, one in base.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_sums_of_log_probabilities(base, adapters, models, kind):
    assert isinstance(models[kind], Scorer) and isinstance(models[kind], CountsScoring)
    scores = models[kind].score(PROMPT, ["a", "bc", ""])
    assert scores[2] == 0
    # A text's score is the sum of its pieces', each after what stands before it.
    first, then = models[kind].score(PROMPT, ["b"])[0], models[kind].score(PROMPT + "b", ["c"])[0]
    assert scores[1] == pytest.approx(first + then, abs=1e-3)
    if kind == "base":
        ids = torch.tensor([base.tokenizer.encode(PROMPT + "bc", add_special_tokens=False)])
        with torch.no_grad():
            logits = base.model(ids).logits.log_softmax(-1)[0]
        expected = sum(float(logits[at - 1, ids[0, at]]) for at in (-2, -1))
        assert scores[1] == pytest.approx(expected, abs=1e-3)


def test_a_stop_text_ends_a_sample_before_it(models):
    (whole,) = models["base"].sample(requests(5, max_new_tokens=20))
    stop = whole.text[3]
    (cut,) = models["base"].sample(requests(5, max_new_tokens=20, stop=(stop, "never")))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.new_tokens < whole.new_tokens and cut.flops < whole.flops


def test_a_prompt_that_is_too_long_is_a_failed_sample(models):
    (sample,) = models["base"].sample([Request("x" * 200, 0)])
    assert "positions" in sample.failure and sample.text == ""
    assert models["base"].score("x" * 500, ["y"])[0] < 0


def test_requests_that_differ_come_back_in_their_order(models):
    mixed = [Request("aa", 1, 4, 1.0), Request("bb", 2, 4, 1.0), Request("aa", 3, 4, 1.0)]
    found = models["base"].sample(mixed)
    assert [one.text for one in found] == [models["base"].sample([one])[0].text for one in mixed]


def test_fingerprints_tell_models_apart_and_not_their_names(base, adapters, models):
    assert len({one.fingerprint for one in models.values()}) == 4
    assert open_local(PlainModel(base), "other").fingerprint == models["base"].fingerprint
    other = replace(build_fused(base, adapters), mixture="logit")
    assert open_local(other).fingerprint != models["fused"].fingerprint


def test_a_router_that_reads_the_future_cannot_sample(base, adapters):
    class Noncausal(UniformRouter):
        causal = False

    with pytest.raises(RoutingError, match="causal"):
        open_local(build_fused(base, adapters, Noncausal, RouterOptions()))


@pytest.mark.parametrize("prompt_tokens", [1, 7, 33])
def test_counted_operations_are_those_of_torch(tiny_model, architecture, prompt_tokens):
    model = tiny_model(architecture)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.ones(1, prompt_tokens, dtype=torch.long), use_cache=False)
    config = FusedConfig(base_config=model.config.to_dict())
    cost = count_cost(FusedForCausalLM(config, model=share_weights(model)))
    # torch counts the whole square of the attention, of which a causal model needs the half.
    square = 4 * cost.attention * prompt_tokens**2
    causal = cost.count(prompt_tokens, 0) - 2 * cost.weights * prompt_tokens
    assert counter.get_total_flops() == pytest.approx(
        2 * cost.weights * prompt_tokens + square, rel=0.02
    )
    assert causal == 2 * cost.attention * prompt_tokens * (prompt_tokens + 1)


def test_writing_costs_as_much_as_reading_the_text_but_its_last_token(base):
    cost = count_cost(build_causal_lm(PlainModel(base)))
    assert cost.count(10, 5) == cost.count(14, 0)
    assert cost.count(10, 1) == cost.count(10, 0)


def test_a_fused_model_costs_its_experts_and_shared_blocks_once(base, adapters):
    fused = build_fused(base, adapters)
    plain, cost = (count_cost(build_causal_lm(model)) for model in (PlainModel(base), fused))
    factors = sum(
        u.a.numel() + u.b.numel() for adapter in adapters for u in adapter.updates.values()
    )
    assert cost.weights == 3 * plain.weights + factors
    shared = FusedModel(base, fused.experts, fused.router, "evidence-zero", "probability", 1)
    less = count_cost(build_causal_lm(shared))
    assert cost.weights > less.weights > plain.weights
    assert less.attention == 3 * plain.attention - 2 * plain.attention // 2
