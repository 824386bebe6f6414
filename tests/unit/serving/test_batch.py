"""Texts that join and leave a running batch say what they say alone."""

import pytest
import torch
from adaptation_helpers import build_population, build_router
from fused_helpers import build_fused, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.errors import RoutingError
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.inference.opening import PlainModel
from molora_fed.models.base import load_base
from molora_fed.population.bundle import EvolvedModel
from molora_fed.serving.batch import RunningBatch
from molora_fed.testing.models import ARCHITECTURES

COLUMNS = ("evidence", "base_hidden", "mean_hidden")
ONE = torch.tensor([0.0, 1.0, 0.0])
"""The specialist alone."""


def build_evolved(base):
    router = build_router()
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.manual_seed(3)))
    return EvolvedModel(base, build_population(base), router.eval(), "parallel-sigmoid")


def build(base, sort):
    match sort:
        case "base":
            return build_causal_lm(PlainModel(base))
        case "evolved":
            return build_causal_lm(build_evolved(base))
    return build_causal_lm(build_fused(base, kinds=("lora", "lora", None), columns=COLUMNS))


def read_alone(model, tokens, gates):
    """What the model says after every token of one text, (T, V) and (T, E)."""
    given = None if gates is None else gates.unsqueeze(0)
    output = model(input_ids=torch.tensor([tokens]), gates=given)
    return output.logits[0], output.gates[0]


def go_on_alone(model, tokens, prompt_length, experts):
    """The same, token for token after the prompt, at whose end experts are chosen."""
    cache = model.make_cache()
    outputs = []
    for piece in (tokens[:prompt_length], *([token] for token in tokens[prompt_length:])):
        outputs.append(model(input_ids=torch.tensor([piece]), past_key_values=cache))
        cache.decide(experts)  # the first time; later it changes nothing
    logits, gates = (torch.cat([getattr(o, n) for o in outputs], 1) for n in ("logits", "gates"))
    return logits[0], gates[0]


class Crowd:
    """Texts that are read in a batch, each held against itself alone."""

    def __init__(self, model, piece=5, experts=None):
        self.model, self.experts = model, experts
        self.batch = RunningBatch(model, piece=piece, experts_per_text=experts)
        self.texts = {}

    def join(self, tokens, prompt_length, gates=None):
        prompt = self.batch.begin(tokens[:prompt_length], gates)
        while self.batch.read_on(prompt) is None:
            pass
        (row,) = self.batch.join(prompt)
        if self.experts is None or gates is not None:
            said = read_alone(self.model, tokens, gates)
        else:
            said = go_on_alone(self.model, tokens, prompt_length, self.experts)
        self.texts[row] = [tokens, prompt_length, *said]
        self.check(row, prompt.prediction)

    def check(self, row, prediction):
        _, length, log_probs, gates = self.texts[row]
        torch.testing.assert_close(prediction.log_probs, log_probs[length - 1], atol=3e-4, rtol=0)
        torch.testing.assert_close(prediction.gates, gates[length - 1], atol=1e-4, rtol=0)

    def leave(self, row):
        self.batch.leave([row])
        del self.texts[row]

    def step(self):
        for row in [row for row, text in self.texts.items() if text[1] == len(text[0])]:
            self.leave(row)
        for row, said in self.batch.step({r: t[0][t[1]] for r, t in self.texts.items()}).items():
            self.texts[row][1] += 1
            self.check(row, said)


@pytest.fixture(scope="module")
def fused(tiny_checkpoint):
    return build(load_base(tiny_checkpoint("llama")), "fused")


@pytest.mark.parametrize("sort", ["base", "fused", "evolved"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_of_other_lengths_join_and_leave(tiny_checkpoint, architecture, sort):
    crowd = Crowd(build(load_base(tiny_checkpoint(architecture)), sort))
    lengths = ((3, 20), (30, 40), (11, 24), (1, 30))
    for index, (prompt_length, length) in enumerate(lengths):
        crowd.join(random_tokens(1, length, seed=index)[0].tolist(), prompt_length)
        crowd.step()
    crowd.leave(next(iter(crowd.texts)))
    while crowd.texts:
        crowd.step()
    assert len(crowd.batch) == 0


@pytest.mark.parametrize("experts", [1, 2, "merged"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_texts_whose_experts_are_chosen_after_the_prompt(tiny_checkpoint, architecture, experts):
    """Beside them one of a specialist, which was asked for by name."""
    crowd = Crowd(build(load_base(tiny_checkpoint(architecture)), "fused"), experts=experts)
    lengths = ((3, 20, None), (30, 40, None), (11, 24, ONE), (1, 30, None))
    for index, (prompt_length, length, gates) in enumerate(lengths):
        tokens = random_tokens(1, length, seed=index)[0].tolist()
        crowd.join(tokens, prompt_length, gates)
        crowd.step()
    crowd.leave(next(iter(crowd.texts)))
    while crowd.texts:
        crowd.step()
    assert len(crowd.batch) == 0


def test_a_way_to_go_on_that_there_is_not_is_refused(tiny_checkpoint, fused):
    base = load_base(tiny_checkpoint("llama"))
    for model, experts in ((fused, 0), (fused, "best"), (build(base, "evolved"), 1)):
        with pytest.raises(RoutingError, match="Cannot generate: expected "):
            RunningBatch(model, experts_per_text=experts)
    alone = Crowd(build(base, "base"), experts="merged")  # who is alone has nothing to choose
    alone.join(random_tokens(1, 8, seed=0)[0].tolist(), 4)
    while alone.texts:
        alone.step()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("join"), st.integers(1, 14), st.integers(1, 8), st.sampled_from([None, ONE])
        ),
        st.tuples(st.just("step")),
        st.tuples(st.just("leave"), st.integers(0, 5)),
    ),
    min_size=4,
    max_size=16,
)


@given(actions=ACTIONS, seed=st.integers(0, 99))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whoever_joins_and_leaves_a_text_stays_what_it_is_alone(fused, actions, seed):
    crowd = Crowd(fused)
    for index, (action, *more) in enumerate(actions):
        if action == "join":
            prompt_length, added, gates = more
            tokens = random_tokens(1, prompt_length + added, seed=100 * seed + index)[0]
            crowd.join(tokens.tolist(), prompt_length, gates)
        elif action == "leave" and crowd.texts:
            crowd.leave([*crowd.texts][more[0] % len(crowd.texts)])
        else:
            crowd.step()
    while crowd.texts:
        crowd.step()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_no_text_reads_anothers_keys(tiny_checkpoint, architecture):
    """Keys and values of one text become NaN, which whatever reads them says again."""
    model = build(load_base(tiny_checkpoint(architecture)), "fused")
    crowd = Crowd(model)
    for index in range(3):
        crowd.join(random_tokens(1, 24, seed=index)[0].tolist(), 6 + 5 * index)
    crowd.step()
    (texts,) = crowd.batch._batches.values()
    poisoned = texts.ids[1]
    for layer in texts.cache.layers:
        for states in (layer.keys, layer.values):
            states.unflatten(0, (-1, 3))[:, 1] = torch.nan
    said = crowd.batch.step({row: text[0][text[1]] for row, text in crowd.texts.items()})
    assert said[poisoned].log_probs.isnan().all()
    for row in crowd.texts.keys() - {poisoned}:
        crowd.texts[row][1] += 1
        crowd.check(row, said[row])


def test_texts_of_one_prompt_go_their_own_ways(fused):
    crowd = Crowd(fused)
    start = random_tokens(1, 9)[0].tolist()
    prompt = crowd.batch.begin(start)
    while crowd.batch.read_on(prompt) is None:
        pass
    for seed, row in enumerate(crowd.batch.join(prompt, 3)):
        tokens = start + random_tokens(1, 6, seed=7 + seed)[0].tolist()
        crowd.texts[row] = [tokens, 9, *read_alone(fused, tokens, None)]
    while crowd.texts:
        crowd.step()
    with pytest.raises(RoutingError, match="not continued yet"):
        crowd.batch.join(prompt)


def test_a_step_without_a_text_is_refused(fused):
    crowd = Crowd(fused)
    crowd.join([1, 2, 3], 2)
    with pytest.raises(RoutingError, match="a token for each of 1 texts, got 0"):
        crowd.batch.step({})


def test_a_prompt_without_tokens_or_with_other_gates_is_refused(fused):
    batch = RunningBatch(fused)
    with pytest.raises(RoutingError, match="at least one token"):
        batch.begin([])
    with pytest.raises(RoutingError, match=r"gates of shape \(3,\), got \(2,\)"):
        batch.begin([1], torch.ones(2))
