from dataclasses import replace

import numpy as np
import pytest
import torch
from adaptation_helpers import DOMAINS, build_all_states, build_population, build_router
from hypothesis import given, settings
from hypothesis import strategies as st
from molora_evolution.scopes import measure_global, measure_per_domain

from molora_fed import hookimpl
from molora_fed.bank.states import build_states
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError
from molora_fed.models.base import load_base
from molora_fed.options import Choice
from molora_fed.plugins import load_plugins
from molora_fed.population import fitness as fitness_module
from molora_fed.population.contract import Fitness, LossTable
from molora_fed.population.files import fingerprint_population
from molora_fed.population.fitness import check_losses, compute_effects, measure_losses
from molora_fed.population.lifecycle import compute_fitness
from molora_fed.population.mixture import Mixture
from molora_fed.population.slots import make_population
from molora_fed.testing import build_random_adapter
from molora_fed.types import Split


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def states(base, tmp_path_factory):
    return build_all_states(base, tmp_path_factory.mktemp("states"), count=5)


def build_full_population(base):
    """Three slots that all change the base."""
    adapters = [
        (f"c{seed}", None, build_random_adapter(base.model, rank=2 + seed, seed=seed, strength=0.2))
        for seed in range(3)
    ]
    return make_population(base, adapters, num_slots=3)


@torch.no_grad()
def compute_by_hand(base, population, router, states, closed):
    """Losses of every predicted token with one gate closed, by domain, (N, T-1)."""
    mixture = Mixture(base.model, population)
    results = []
    for state in states:
        batch = state.take(range(len(state)))
        gates = router(batch.view)
        if closed is not None:
            gates[..., closed] = 0
        with mixture.mixed(gates):
            logits = base.model(input_ids=batch.tokens).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
        )
        results.append(losses.view(len(state), -1).double().numpy())
    return results


def test_losses_are_those_of_the_counterfactuals_by_cluster(base, states):
    population, router = build_full_population(base), build_router()
    table = measure_losses(base, population, router, states, batch=2)
    assert table.domains == tuple(DOMAINS) and table.passes == 4
    clusters = [state.blocks.clusters[:, 1:] for state in states]
    for row, closed in [(table.full, None), *((table.without[i], i) for i in range(3))]:
        losses = compute_by_hand(base, population, router, states, closed)
        wanted = [
            values[own == cluster].sum()
            for values, own in zip(losses, clusters, strict=True)
            for cluster in np.unique(own)
        ]
        np.testing.assert_allclose(row, wanted, rtol=1e-5)
    wanted = [
        -state.logprob.double().numpy()[:, 1:][own == cluster].sum()
        for state, own in zip(states, clusters, strict=True)
        for cluster in np.unique(own)
    ]
    np.testing.assert_allclose(table.base, wanted, rtol=1e-12)
    assert table.counts.sum() == sum(own.size for own in clusters)
    assert np.bincount(table.domain_of).tolist() == [10, 10]


def test_the_base_is_not_run_again_and_inert_slots_need_no_pass(base, states, monkeypatch):
    passes = []
    real = fitness_module.run_blocks

    def count(model, tokens, **options):
        passes.append(len(tokens))
        return real(model, tokens, **options)

    monkeypatch.setattr(fitness_module, "run_blocks", count)
    population, router = build_population(base), build_router()  # two of three slots are fresh
    calls = []
    table = measure_losses(
        base, population, router, states, batch=2, progress=lambda *a: calls.append(a)
    )
    assert table.passes == 2 and sum(passes) == 2 * sum(map(len, states))
    assert calls == [(n, 6) for n in range(1, 7)]
    assert np.array_equal(table.without[1], table.full)
    assert np.array_equal(table.without[2], table.full)
    assert not np.array_equal(table.without[0], table.full)


def test_a_population_without_its_only_slot_is_the_base(base, states):
    adapter = build_random_adapter(base.model, rank=2, seed=1)
    population = make_population(base, [("one", None, adapter)], num_slots=1)
    table = measure_losses(base, population, build_router(num_slots=1), states, batch=16)
    assert np.array_equal(table.without[0], table.base)


def test_measuring_changes_nothing_and_repeats_itself(base, states):
    population, router = build_full_population(base), build_router().train()
    before = fingerprint_population(population), router.weight.detach().clone()
    first, second = (measure_losses(base, population, router, states) for _ in range(2))
    assert np.array_equal(first.without, second.without)
    assert np.array_equal(first.full, second.full)
    assert fingerprint_population(population) == before[0]
    assert torch.equal(router.weight, before[1]) and router.training
    assert all(p.requires_grad for p in router.parameters())


def test_what_cannot_be_measured_is_refused(base, states, tmp_path):
    population, router = build_full_population(base), build_router()
    with pytest.raises(PopulationError, match="a router of 3 slots, got 2"):
        measure_losses(base, population, build_router(num_slots=2), states)
    with pytest.raises(PopulationError, match="got 'up' twice"):
        measure_losses(base, population, router, [states[0], states[0]])
    with pytest.raises(PopulationError, match="got no domain"):
        measure_losses(base, population, router, [])
    empty = Blocks("up", Split.CALIBRATION, *(np.zeros((0, 16), np.int32),) * 3)
    with pytest.raises(PopulationError, match="no blocks of 'up'"):
        measure_losses(base, population, router, [replace(states[0], blocks=empty)])
    broken = build_router()
    with torch.no_grad():
        broken.weight[2, 0] = torch.nan
    with pytest.raises(PopulationError, match=r"got others without nobody, 'g0-s0', 'g0-s1'"):
        measure_losses(base, population, broken, states)


def test_a_cluster_number_may_be_in_two_domains(base, tmp_path):
    """Numbers of clusters are by domain: the same in two domains is another cluster."""
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) + 20
    clusters = np.repeat(np.arange(2, dtype=np.int32), 16).reshape(2, 16)
    blocks = [Blocks(d, Split.CALIBRATION, tokens, clusters, clusters) for d in ("a", "b")]
    states = build_states(base, blocks, frozenset({"base_hidden"}), tmp_path)
    table = measure_losses(base, build_full_population(base), build_router(), states)
    assert table.domain_of.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(table.full[:2], table.full[2:], rtol=1e-6)


# --- effects -----------------------------------------------------------------------------------


def build_table(effects, *, clusters=40, noise=0.0, seed=0, ragged=True, base=3.0):
    """Losses with these mean effects by slot and domain, nats; sizes of clusters differ."""
    random = np.random.default_rng(seed)
    effects = np.asarray(effects, dtype=np.float64)
    slots, domains = effects.shape
    domain_of = np.repeat(np.arange(domains), clusters)
    size = random.integers(5, 60, domains * clusters) if ragged else np.full(len(domain_of), 20)
    counts = size.astype(np.float64)
    full = counts * random.normal(2.5, 0.3, len(counts))
    added = effects[:, domain_of] + noise * random.standard_normal((slots, len(counts)))
    names = tuple(f"d{i}" for i in range(domains))
    return LossTable(names, domain_of, counts, base * counts, full, full + added * counts, 1)


def test_exact_effects_have_no_error():
    effects = np.array([[0.1, -0.2], [0.0, 0.3]])
    found = compute_effects(build_table(effects))
    np.testing.assert_allclose(found.by_domain, effects, atol=1e-12)
    np.testing.assert_allclose(found.domain_errors, 0, atol=1e-12)
    assert (found.total_errors > 0).all()  # domains differ


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_total_is_the_token_weighted_mean_of_domains(seed):
    table = build_table([[0.1, -0.2, 0.0], [0.0, 0.3, 0.1]], noise=0.2, seed=seed)
    found = compute_effects(table)
    weights = np.bincount(table.domain_of, weights=table.counts)
    np.testing.assert_allclose(found.total, found.by_domain @ weights / weights.sum())
    np.testing.assert_allclose(
        found.regret,
        [(table.full - table.base)[table.domain_of == d].sum() / weights[d] for d in range(3)],
    )


def test_standard_errors_are_those_of_repeated_samples():
    """Over many samples of documents, the effect varies as its error says."""
    tables = [build_table([[0.1, -0.1]], noise=0.3, seed=seed) for seed in range(400)]
    found = [compute_effects(table) for table in tables]
    for domain in range(2):
        spread = np.std([one.by_domain[0, domain] for one in found], ddof=1)
        stated = np.sqrt(np.mean([one.domain_errors[0, domain] ** 2 for one in found]))
        assert stated == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"full": np.zeros(3)}, r"full of shape \(3,\)"),
        ({"without": np.zeros((0, 80))}, r"without of shape \(0, 80\)"),
        ({"base": np.full(80, np.nan)}, "NaN or infinity in base"),
        ({"counts": np.zeros(80)}, "a cluster without tokens"),
        ({"domain_of": np.r_[np.zeros(79, int), 1]}, "1 clusters of 'd1'"),
        ({"domain_of": np.repeat([0, 2], 40)}, "clusters of a domain 2; 0 clusters of 'd1'"),
        ({"domains": ("d0", "d1", "d2")}, "0 clusters of 'd2'"),
    ],
)
def test_losses_without_a_fitness_are_refused(change, named):
    table = replace(build_table([[0.1, 0.2]]), **change)
    with pytest.raises(PopulationError, match=named) as caught:
        check_losses(table)
    assert "\n" not in str(caught.value)
    with pytest.raises(PopulationError):
        measure_global(table)


# --- scopes ------------------------------------------------------------------------------------


def test_global_and_per_domain_can_disagree_about_who_is_least_fit():
    """A specialist that costs the others more than it brings its own domain, and a weak helper."""
    table = build_table([[0.3, -0.2, -0.2], [0.01, 0.01, 0.01]], ragged=False, noise=0.01)
    one, other = measure_global(table), measure_per_domain(table)
    assert one.scope == "global" and other.scope == "per-domain"
    assert one.values.argmin() == 0 and other.values.argmin() == 1
    np.testing.assert_allclose(one.values, [-0.1 / 3, 0.01], atol=0.01)
    np.testing.assert_allclose(other.values, [0.3, 0.01], atol=0.01)
    assert np.array_equal(one.by_domain, other.by_domain)
    assert (one.errors > 0).all() and (other.errors > 0).all()


def test_the_error_per_domain_is_that_of_the_domain_chosen():
    table = build_table([[0.3, -0.2], [0.0, 0.5]], noise=0.1)
    effects, found = compute_effects(table), measure_per_domain(table)
    assert found.errors.tolist() == [effects.domain_errors[0, 0], effects.domain_errors[1, 1]]


def test_one_domain_has_no_fitness_per_domain():
    table = build_table([[0.1], [0.2]])
    with pytest.raises(PopulationError, match=r"two domains at least, got d0\. Use the scope"):
        measure_per_domain(table)
    assert measure_global(table).values.shape == (2,)


@pytest.mark.parametrize("name", load_plugins().fitness_scopes.names())
def test_registered_scopes_give_a_fitness(name):
    table = build_table([[0.1, 0.2], [0.0, 0.1], [0.3, 0.3]], noise=0.1)
    fitness = compute_fitness(Choice(name=name), table, load_plugins())
    assert isinstance(fitness, Fitness) and fitness.scope == name
    assert fitness.by_domain.shape == (3, 2) and (fitness.errors >= 0).all()


def test_a_scope_that_breaks_the_contract_is_named():
    def measure_nothing(table):
        return Fitness("broken", np.zeros(2), np.zeros(1), np.full((1, 2), np.inf), np.zeros(2))

    @hookimpl
    def register_fitness_scopes(register):
        register("broken", measure_nothing, summary="Nothing", source="own definition")

    hooks = {"register_fitness_scopes": staticmethod(register_fitness_scopes)}
    plugin = type("Plugin", (), hooks)
    plugins = load_plugins(extra=[("broken 1", plugin)])
    with pytest.raises(PopulationError) as caught:
        compute_fitness(Choice(name="broken"), build_table([[0.1, 0.2]]), plugins)
    assert "scope 'broken'" in str(caught.value)
    assert "values of shape (2,)" in str(caught.value) and "by_domain" in str(caught.value)
    assert "errors" not in str(caught.value)
