"""Registered by name, so that nothing heavy loads before it is used."""

from molora_fed import Register, hookimpl


@hookimpl
def register_adapter_routers(register: Register) -> None:
    """Register what this package adds."""
    register(
        "sample-adapter-router",
        f"{__name__}.gates:SampleAdapterRouter",
        summary="One learned gate a slot, the same at every token",
        source="own definition",
    )
