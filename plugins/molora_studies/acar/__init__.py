"""The study of ACAR (arXiv 2602.21231)."""

from molora_fed.hookspecs import Register

_PAPER = "arXiv 2602.21231"


def register_studies(register: Register) -> None:
    """Register the study of the paper's claims."""
    register(
        "acar",
        "molora_studies.acar.acar:AcarStudy",
        summary="Escalation by disagreement against fixed ensembles",
        source=_PAPER,
    )
