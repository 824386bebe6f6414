"""Studies of the papers' claims: their framework, and `molora study`, on molora-fed's hooks."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register


@hookimpl
def register_commands(register: Register) -> None:
    """Register `molora study`."""
    register(
        "study",
        "molora_studies.command:study",
        summary="Run a study: many small runs that answer one question",
        source="own definition",
    )
