"""A worked third-party plugin; registers by name only, so nothing heavy loads before use."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register


@hookimpl
def register_routers(register: Register) -> None:
    """Register the router."""
    register(
        "last-token",
        "molora_last_token.router:LastTokenRouter",
        summary="Follows the evidence of the last token alone",
        source="own definition",
    )
