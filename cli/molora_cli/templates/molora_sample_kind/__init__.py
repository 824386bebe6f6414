"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_adapter_kinds(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-kind",
        f"{__name__}.kind:SampleKind",
        summary="LoRA that trains factor B alone",
        source="own definition",
    )
