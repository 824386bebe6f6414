"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_escalation_policies(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-policy",
        f"{__name__}.policy:SamplePolicy",
        summary="All members above a disagreement, else none",
        source="own definition",
    )
