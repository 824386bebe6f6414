"""A worked third-party plugin: registered by name, so nothing heavy loads before use."""

from molora_fed import Register, hookimpl


@hookimpl
def register_routers(register: Register) -> None:
    """Register the router."""
    register("last-token", f"{__name__}.router:LastTokenRouter", summary="Last token", source="own")
