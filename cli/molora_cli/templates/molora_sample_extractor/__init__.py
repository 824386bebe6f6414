"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_extractors(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-extractor",
        f"{__name__}.extractor:extract",
        summary="The last line that says anything",
        source="own definition",
    )
