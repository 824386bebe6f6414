"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_lifecycle_operators(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-operator",
        f"{__name__}.operator:SampleOperator",
        summary="Frees the least fit slot",
        source="own definition",
    )
