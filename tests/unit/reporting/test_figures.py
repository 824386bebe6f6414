import struct

import pytest

from molora_fed.reporting import figures

DRAWN = (
    figures.draw_losses,
    figures.draw_loss_matrix,
    figures.draw_gates,
    figures.draw_forecasts,
)


def read_size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("draw", DRAWN)
def test_figures_are_pictures_of_a_readable_size(draw, result):
    width, height = read_size(draw(result))
    assert 900 <= width <= 2400
    assert 400 <= height <= 2400


def test_training_curves(metrics):
    width, _ = read_size(figures.draw_training_curves(metrics))
    assert width >= 900


def test_the_same_result_gives_the_same_bytes(result):
    assert figures.draw_losses(result) == figures.draw_losses(result)


@pytest.mark.parametrize("draw", (figures.draw_losses, figures.draw_loss_matrix))
def test_without_intervals_and_baselines(draw, minimal):
    read_size(draw(minimal))


def test_forecasts_without_point_interval_or_outcome(result):
    for forecast in result["forecasts"].values():
        forecast.update(point=None, low=None, high=None, level=None, actual=None)
    read_size(figures.draw_forecasts(result))


def test_curves_without_validations(metrics):
    for rows in metrics.values():
        for row in rows:
            row["validation_loss"] = None
    read_size(figures.draw_training_curves(metrics))


def test_one_router_and_many_experts(result):
    experts = {f"expert-{i}": 1 / 12 for i in range(12)}
    result["gates"] = {"evidence": {domain: experts for domain in result["domains"]}}
    read_size(figures.draw_gates(result))


@pytest.mark.parametrize("draw", (figures.draw_loss_matrix, figures.draw_gates))
def test_heat_maps_of_many_stay_readable_in_size(draw, result):
    domains = [f"domain-{i}" for i in range(30)]
    losses = result["losses"]
    for name, by_domain in losses.items():
        if name in ("specialists", "fused"):
            for one in by_domain.values():
                one.update(dict.fromkeys(domains, 3.0))
        elif by_domain is not None:
            by_domain.update(dict.fromkeys(domains, 3.0))
    result["domains"] = domains
    experts = dict.fromkeys(domains, 1 / 30)
    result["gates"] = {"evidence": dict.fromkeys(domains, experts), "linear": {}}
    result["gates"]["linear"] = result["gates"]["evidence"]
    width, height = read_size(draw(result))
    assert width <= 2700 and height <= 2700
