"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_domains(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-domain",
        f"{__name__}.domain:SampleDomain",
        summary="The help texts of Python's language reference",
        source="own definition",
    )
