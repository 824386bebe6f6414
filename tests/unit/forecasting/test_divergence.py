import pytest

from molora_fed.errors import ConfigError
from molora_fed.forecasting.divergence import (
    best_own_losses,
    compute_divergences,
    compute_equal_weight_loss,
    compute_gain_percent,
    compute_gains,
    compute_reference_losses,
)
from molora_fed.types import LossMatrix


def build_matrix(**changes):
    fields = {
        "domains": ("law", "art", "sea"),
        "base": {"law": 4.0, "art": 2.0, "sea": 3.0},
        "specialists": {
            "ann": {"law": 3.0, "art": 2.5, "sea": 3.0},
            "bob": {"law": 4.5, "art": 1.0, "sea": 3.5},
            "cat": {"law": 2.0, "art": 2.5, "sea": 3.0},
        },
        "own_domain": {"ann": "law", "bob": "art", "cat": "law"},
    }
    return LossMatrix(**{**fields, **changes})


def test_the_best_of_a_domains_specialists_counts_and_an_open_domain_keeps_the_base():
    assert best_own_losses(build_matrix()) == {"law": 2.0, "art": 1.0, "sea": 3.0}
    assert compute_divergences(build_matrix()) == {"law": 50.0, "art": 50.0, "sea": 0.0}


def test_divergence_is_negative_where_the_specialist_is_worse_than_the_base():
    worse = {"bob": {"law": 4.5, "art": 3.0, "sea": 3.5}}
    matrix = build_matrix(specialists=worse, own_domain={"bob": "art"})
    assert compute_divergences(matrix)["art"] == -50.0


def test_gains_name_what_they_are_measured_against():
    matrix = build_matrix()
    assert compute_reference_losses(matrix) == {
        "best_alone": pytest.approx(7.5 / 3),
        "best_specialist": pytest.approx(7.5 / 3),
    }
    forgetful = build_matrix(
        specialists={"ann": {"law": 3.0, "art": 4.0, "sea": 5.0}}, own_domain={"ann": "law"}
    )
    gains = compute_gains(forgetful, {"law": 3.0, "art": 2.0, "sea": 1.0})
    assert gains["best_specialist"] == pytest.approx(50.0)
    assert gains["best_alone"] == pytest.approx(100 * 3 / 9)


def test_no_gain_without_a_positive_reference():
    with pytest.raises(ConfigError, match="above 0 nats, got 0"):
        compute_gain_percent(0.0, 1.0)


def test_a_missing_domain_is_named():
    with pytest.raises(ConfigError, match="none for sea"):
        compute_equal_weight_loss({"law": 1.0}, ("law", "sea"))
    with pytest.raises(ConfigError, match="none"):
        compute_equal_weight_loss({}, ())


def test_no_reference_without_a_specialist():
    with pytest.raises(ConfigError, match="at least one specialist"):
        compute_reference_losses(build_matrix(specialists={}, own_domain={}))
