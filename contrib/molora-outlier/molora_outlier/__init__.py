"""An admission check for molora-fed: adapters whose size or spectrum no honest training has."""

from molora_fed import Register, hookimpl


@hookimpl
def register_admission_checks(register: Register) -> None:
    """Register the check; a charter names it, nothing runs where none does."""
    register(
        "norm-and-spectrum",
        f"{__name__}.check:OutlierCheck",
        summary="Norms and spectrum of the adapter lie where honest trainings' do",
        source="own definition",
    )
