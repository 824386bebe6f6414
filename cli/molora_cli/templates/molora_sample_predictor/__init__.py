"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_gain_predictors(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-predictor",
        f"{__name__}.predictor:SamplePredictor",
        summary="A share of the mean divergence",
        source="own definition",
    )
