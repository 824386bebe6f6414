import math

import pytest
import torch
from adaptation_helpers import build_all_states, build_population, build_router
from molora_evolution.search import (
    SearchConfig,
    search_by_evolution,
    search_by_gradient,
    search_router,
)

from molora_fed.bank.states import take_balanced
from molora_fed.errors import PopulationError
from molora_fed.models.base import load_base
from molora_fed.population.adaptation import compute_loss
from molora_fed.population.mixture import Mixture

SEARCHES = [search_by_evolution, search_by_gradient]
TARGET = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.8])
CONFIG = SearchConfig(evaluations=480, learning_rate=0.05, pairs=4)


class Bowl:
    """Squared distance to the target, and which updates it was measured at."""

    def __init__(self):
        self.updates = []

    def __call__(self, parameters, update):
        self.updates.append(update)
        return (parameters - TARGET).square().sum()


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_the_bottom_of_a_bowl(search):
    start = torch.zeros(5)
    result = search(Bowl(), start, CONFIG)
    assert torch.allclose(result.parameters, TARGET, atol=0.1)
    assert torch.equal(start, torch.zeros(5)) and not result.parameters.requires_grad
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_takes_exactly_the_evaluations_it_is_told(search):
    bowl = Bowl()
    result = search(bowl, torch.zeros(5), CONFIG)
    assert len(bowl.updates) == result.evaluations == CONFIG.evaluations
    per_update = 2 * CONFIG.pairs if search is search_by_evolution else 1
    assert bowl.updates == [u for u in range(480 // per_update) for _ in range(per_update)]
    assert len(result.losses) == 480 // per_update
    assert result.forward_passes == 480 * (1 if search is search_by_evolution else 3)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_seed_gives_the_same_parameters(search):
    with torch.random.fork_rng():
        first = search(Bowl(), torch.zeros(5), CONFIG)
        torch.manual_seed(991)
        assert torch.equal(search(Bowl(), torch.zeros(5), CONFIG).parameters, first.parameters)


def test_another_seed_perturbs_otherwise():
    found = [
        search_by_evolution(
            Bowl(), torch.zeros(5), SearchConfig(evaluations=8, pairs=4, seed=seed)
        ).parameters
        for seed in (0, 1)
    ]
    assert not torch.equal(*found)


def test_the_estimate_points_along_the_gradient():
    slope = torch.linspace(-1, 1, 40)
    config = SearchConfig(evaluations=400, pairs=200, learning_rate=1.0)
    estimates = []

    class Spy(torch.optim.Adam):
        def step(self):
            estimates.append(self.param_groups[0]["params"][0].grad.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Spy)
        search_by_evolution(lambda x, _: x @ slope, torch.zeros(40), config)
    (estimate,) = estimates
    assert torch.cosine_similarity(estimate, slope, dim=0) > 0.85


def test_losses_that_are_all_equal_move_nothing():
    result = search_by_evolution(lambda x, _: torch.tensor(1.0), torch.ones(5), CONFIG)
    assert torch.equal(result.parameters, torch.ones(5))


@pytest.mark.parametrize("search", SEARCHES)
def test_what_cannot_be_searched_is_refused(search):
    with pytest.raises(PopulationError, match=r"finite losses, got nan at update 0"):
        search(lambda x, _: x.sum() * math.nan, torch.ones(5), CONFIG)
    with pytest.raises(PopulationError, match="evaluations 0"):
        search(Bowl(), torch.ones(5), SearchConfig(evaluations=0))
    with pytest.raises(PopulationError, match=r"learning_rate 0\.0; spread -1"):
        search(Bowl(), torch.ones(5), SearchConfig(16, learning_rate=0.0, spread=-1))


def test_whole_updates_are_asked_for():
    with pytest.raises(PopulationError, match="20 evaluations of 16 per update"):
        search_by_evolution(Bowl(), torch.ones(5), SearchConfig(evaluations=20))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_routers_parameters_are_searched_through_the_model(search, tiny_checkpoint, tmp_path):
    base = load_base(tiny_checkpoint())
    states = build_all_states(base, tmp_path, count=6)
    population, router = build_population(base), build_router()
    before = {name: values.clone() for name, values in router.state_dict().items()}
    config = SearchConfig(evaluations=160, learning_rate=0.1, pairs=4)
    found, result = search_router(search, base, population, router, states, config, batch=4, seed=0)
    assert all(torch.equal(values, before[n]) for n, values in router.state_dict().items())
    assert found.temperature == router.temperature
    assert result.evaluations == 160
    mixture, batch = Mixture(base.model, population), take_balanced(states, 0, batch=12, seed=0)
    with torch.no_grad():
        losses = [float(compute_loss(base.model, mixture, r, batch)) for r in (router, found)]
    assert losses[1] < losses[0] - 0.005
    assert not any(p.requires_grad for p in base.model.parameters())
