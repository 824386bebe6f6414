"""A router for molora-fed: a learned gate of every token by itself."""

from molora_fed import Register, hookimpl


@hookimpl
def register_routers(register: Register) -> None:
    """Register the router."""
    register(
        "token-gate",
        f"{__name__}.router:TokenRouter",
        summary="A learned gate of every token by itself, on the base's state",
        source="arXiv 2603.15965",
    )
