"""Studies of evolutionary mixture of LoRA (arXiv 2605.11153)."""

from molora_fed.hookspecs import Register

_PAPER = "arXiv 2605.11153"


def register_studies(register: Register) -> None:
    """Register the studies of the paper's claims."""
    for name, target, summary in (
        (
            "base-perturbation",
            "base_perturbation:BasePerturbationStudy",
            "The lifecycle on perturbed bases",
        ),
        ("factorial", "factorial:FactorialStudy", "Router, scope and lifecycle, decomposed"),
        ("guard", "guard:GuardStudy", "What the guard of a lifecycle keeps"),
        ("inheritance", "inheritance:InheritanceStudy", "Shares of the parent in a newborn"),
        ("sandbox", "sandbox:SandboxStudy", "Evolution against gradient on a synthetic teacher"),
    ):
        register(name, f"molora_studies.evolution.{target}", summary=summary, source=_PAPER)
