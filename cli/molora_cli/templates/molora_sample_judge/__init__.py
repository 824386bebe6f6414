"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_judges(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-judge",
        f"{__name__}.judge:judge",
        summary="The shortest text with an answer",
        source="own definition",
    )
