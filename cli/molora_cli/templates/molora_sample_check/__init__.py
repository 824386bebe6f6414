"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_admission_checks(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-check",
        f"{__name__}.check:SampleCheck",
        summary="No update of a layer is larger than a limit",
        source="own definition",
    )
