"""ACAR (arXiv 2602.21231), escalation by disagreement, on molora-fed's public hooks."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register

_PAPER = "arXiv 2602.21231"


@hookimpl
def register_extractors(register: Register) -> None:
    """Register one extractor a sort of answer."""
    register(
        "normalised-text",
        "molora_acar.extractors:extract_text",
        summary="The first line, without case, outer punctuation and repeated spaces",
        source=f"{_PAPER}; own definition, see docs/cascades.md",
    )


@hookimpl
def register_judges(register: Register) -> None:
    """Register what selects an answer where all members gave one."""
    register(
        "majority",
        "molora_acar.judges:judge_by_majority",
        summary="The answer most candidates gave, the earliest of equals",
        source=f"{_PAPER}; own definition, see docs/cascades.md",
    )


@hookimpl
def register_escalation_policies(register: Register) -> None:
    """Register what decides how many members are asked."""
    register(
        "sigma",
        "molora_acar.policies:SigmaPolicy",
        summary="Agreement asks nobody, partial agreement two members, none all",
        source=f"{_PAPER}, routing by self-consistency variance",
    )
