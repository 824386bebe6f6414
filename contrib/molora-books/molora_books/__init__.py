"""A domain for molora-fed: a folder of books."""

from molora_fed import Register, hookimpl


@hookimpl
def register_domains(register: Register) -> None:
    """Register the domain."""
    register(
        "books",
        f"{__name__}.domain:Books",
        summary="A folder of books, one document a chapter",
        source="own definition",
    )
