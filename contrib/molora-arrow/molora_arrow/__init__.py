"""A router for molora-fed made of the adapters alone: their first singular directions."""

from molora_fed import Register, hookimpl


@hookimpl
def register_routers(register: Register) -> None:
    """Register the router."""
    register(
        "arrow",
        f"{__name__}.router:ArrowRouter",
        summary="How far a state lies along the direction an adapter reads most",
        source="arXiv 2405.11157",
    )
