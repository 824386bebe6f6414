"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_merges(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-merge",
        f"{__name__}.merge:SampleMerge",
        summary="The median of all adapters, number by number",
        source="own definition",
    )
