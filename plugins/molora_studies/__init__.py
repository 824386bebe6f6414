"""Studies of the papers' claims, and the tournament of routers, on molora-fed's hooks."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register


@hookimpl
def register_commands(register: Register) -> None:
    """Register `molora study` and `molora tournament`."""
    register(
        "study",
        "molora_studies.command:study",
        summary="Run a study: many small runs that answer one question",
        source="own definition",
    )
    register(
        "tournament",
        "molora_studies.tournament.command:tournament",
        summary="Fit every registered router on the same frozen adapters, and rank them",
        source="own definition",
    )
