"""KALAVAI (arXiv 2603.22755) on molora-fed's public hooks: routers and gain predictors."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register

_PAPER = "arXiv 2603.22755"


@hookimpl
def register_routers(register: Register) -> None:
    """Register the paper's routers, their causal forms, and the evidence routers."""
    register(
        "uniform",
        "molora_kalavai.uniform:UniformRouter",
        summary="The same gate for every expert",
        source=_PAPER,
    )
    register(
        "mlp",
        "molora_kalavai.mlp:MlpRouter",
        summary="Two-layer softmax gates on a causal running mean of hidden states",
        source=f"{_PAPER}, made causal",
    )
    register(
        "hard",
        "molora_kalavai.hard:HardRouter",
        summary="The linear router's best expert alone; all experts run",
        source=f"{_PAPER}, made causal",
    )
    register(
        "dispatch",
        "molora_kalavai.dispatch:DispatchRouter",
        summary="A domain classifier chooses one expert per document from its first tokens",
        source=f"{_PAPER}, made causal, see docs/routers.md",
    )
    register(
        "linear",
        "molora_kalavai.linear:LinearRouter",
        summary="Linear softmax gates on a causal running mean of hidden states",
        source=f"{_PAPER}, made causal",
    )
    register(
        "linear-noncausal",
        "molora_kalavai.linear:NoncausalLinearRouter",
        summary="As published: pooled over the whole sequence; reproduction only",
        source=_PAPER,
    )
    register(
        "evidence",
        "molora_kalavai.evidence:EvidenceRouter",
        summary="Bayesian mixture of experts, decays and weights fitted on calibration",
        source="own derivation, see docs/routers.md",
    )
    register(
        "evidence-zero",
        "molora_kalavai.evidence:ZeroTrainingEvidenceRouter",
        summary="Bayesian mixture of experts with nothing fitted",
        source="own derivation, see docs/routers.md",
    )
    register(
        "evidence-mixed",
        "molora_kalavai.evidence_mixed:MixedEvidenceRouter",
        summary="evidence and evidence-zero, weighed by their own evidence: a bounded loss",
        source="own derivation, see docs/routers.md",
    )
    register(
        "evidence-share",
        "molora_kalavai.evidence_share:FixedShareRouter",
        summary="Evidence with a fitted rate of switching experts within a document",
        source="fixed share (Herbster and Warmuth 1998), see docs/routers.md",
    )
    register(
        "evidence-hidden",
        "molora_kalavai.evidence_hidden:EvidenceHiddenRouter",
        summary="Evidence and hidden states' statistics, kept only where these help",
        source="own derivation, see docs/routers.md",
    )
    register(
        "statistics",
        "molora_kalavai.lda:StatisticsRouter",
        summary="Linear discriminant of domains in closed form, two levels of covariance",
        source="own derivation, see docs/routers.md",
    )


@hookimpl
def register_gain_predictors(register: Register) -> None:
    """Register forecasts of the fusion gain from loss matrices."""
    own = "own derivation, see docs/forecasts.md"
    for name, function, summary, source in (
        ("kalavai-law", "kalavai_law", "0.82 x mean divergence - 2.72", f"{_PAPER}, abstract"),
        ("kalavai-law-refit", "kalavai_law_refit", "0.83 x mean divergence - 2.80", _PAPER),
        ("own-loss", "own_loss", "From own-domain losses, nothing fitted", own),
        ("own-loss-bracket", "own_loss_bracket", "Bracket against the best anyone has", own),
        ("loss-matrix", "loss_matrix", "Domain oracle of the full loss matrix", _PAPER),
        ("forgetting", "forgetting", "own-loss and what specialists forget off-domain", own),
        ("fitted", "fitted", "One constant on own-loss, fitted over past outcomes", own),
    ):
        target = f"molora_kalavai.predictors:predict_{function}"
        register(name, target, summary=summary, source=source)
    for name, function, reference in (
        ("measured-alone", "measured_alone", "best anyone has alone"),
        ("measured-specialist", "measured_specialist", "best specialist"),
    ):
        register(
            name,
            f"molora_kalavai.headline:predict_{function}",
            summary=f"On the {reference}: all losses or pilots, residuals of our own fusions",
            source=own,
        )


@hookimpl
def register_merges(register: Register) -> None:
    """Register merges published elsewhere, applied to the product B@A."""
    module = "molora_kalavai.merges"
    register(
        "ties",
        f"{module}:TiesMerge",
        summary="Largest 20 % of each difference, majority sign, mean of those that agree",
        source="arXiv 2306.01708 (PEFT's ties)",
    )
    register(
        "dare",
        f"{module}:DareMerge",
        summary="Half of each difference dropped at random and rescaled, then averaged",
        source="arXiv 2311.03099 (PEFT's dare_linear)",
    )
    register(
        "dare-ties",
        f"{module}:DareTiesMerge",
        summary="Half of each difference dropped at random and rescaled, then merged by sign",
        source="arXiv 2311.03099 (PEFT's dare_ties)",
    )
