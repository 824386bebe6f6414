from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import ConfigError
from molora_fed.training.freezing import MEASURED, PUBLISHED, FreezeCurve, recommend_frozen_depth

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "kalavai"
STEPS = st.integers(1, 10**7)


@pytest.mark.parametrize(
    ("steps", "blocks", "depth"),
    [(300, 4, 0), (9_999, 24, 0), (10_000, 24, 4), (50_000, 4, 1), (10_000, 1, 0), (10_000, 2, 1)],
)
def test_depth_follows_the_crossover(steps, blocks, depth):
    assert recommend_frozen_depth(steps, blocks).frozen_depth == depth


@given(STEPS, st.integers(1, 200))
def test_a_block_always_stays_free_and_longer_training_never_freezes_less(steps, blocks):
    advice = recommend_frozen_depth(steps, blocks)
    assert 0 <= advice.frozen_depth < blocks
    assert recommend_frozen_depth(2 * steps, blocks).frozen_depth >= advice.frozen_depth


@given(STEPS)
def test_the_difference_lies_within_what_was_measured(steps):
    differences = [frozen - free for _, free, frozen in PUBLISHED.gains]
    assert min(differences) <= PUBLISHED.compute_difference(steps) <= max(differences)


def test_measured_points_are_met_and_the_sign_changes_between_5000_and_10000():
    for steps, free, frozen in PUBLISHED.gains:
        assert PUBLISHED.compute_difference(steps) == pytest.approx(frozen - free)
    assert PUBLISHED.compute_difference(5_600) < 0 < PUBLISHED.compute_difference(5_700)


def test_another_curve_gives_other_advice():
    ours = FreezeCurve(400, 1, 4, ((100, 5.0, 4.0), (800, 6.0, 6.5)), "measured")
    advice = recommend_frozen_depth(400, 8, curve=ours)
    assert advice.frozen_depth == 2
    assert "at or above the crossover at 400" in advice.describe()
    assert "measured" in advice.describe()


def test_our_own_curve_has_no_crossover_and_advises_against_freezing():
    advice = recommend_frozen_depth(1_800, 4, curve=MEASURED)
    assert (advice.frozen_depth, round(advice.difference_percent, 2)) == (0, -1.23)
    assert "no crossover was seen" in advice.describe()
    rows = (RESULTS / "duration.md").read_text()
    for steps, free, frozen in MEASURED.gains:  # what the study's page says
        assert f"| {steps} | +{free:.2f} %" in rows and f"| +{frozen:.2f} % [" in rows


@pytest.mark.parametrize(("steps", "blocks"), [(0, 4), (10, 0)])
def test_nothing_planned_is_refused(steps, blocks):
    with pytest.raises(ConfigError, match="at least 1 step and 1 block"):
        recommend_frozen_depth(steps, blocks)
