"""A router for molora-fed by gates that each contributor trained and signed, and these gates."""

from molora_fed import Register, hookimpl


@hookimpl
def register_carried_files(register: Register) -> None:
    """Register what a contributor computes; a charter asks for it in `fusion.carried`."""
    register(
        "phatgoose-gate",
        f"{__name__}.gate:Gate",
        summary="A gate that opens on the contributor's own text",
        source="arXiv 2402.05859",
    )


@hookimpl
def register_routers(register: Register) -> None:
    """Register the router that reads it."""
    register(
        "phatgoose",
        f"{__name__}.router:PhatgooseRouter",
        summary="Gates that contributors trained at home",
        source="arXiv 2402.05859",
    )
