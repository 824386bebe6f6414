"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_fitness_scopes(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-scope",
        f"{__name__}.scope:measure",
        summary="The effect in the domain where it is smallest",
        source="own definition",
    )
