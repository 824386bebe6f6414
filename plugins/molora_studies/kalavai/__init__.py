"""Studies of KALAVAI (arXiv 2603.22755)."""

from molora_fed.hookspecs import Register

_PAPER = "arXiv 2603.22755"


def register_studies(register: Register) -> None:
    """Register the studies of the paper's claims."""
    for name, target, summary in (
        ("adapter-regime", "adapter_regime:AdapterRegimeStudy", "Adapters' bytes against gain"),
        ("collapse", "collapse:CollapseStudy", "How often each router loses a domain"),
        ("cross-lingual", "cross_lingual:CrossLingualStudy", "Languages the base never saw"),
        ("divergence-law", "divergence_law:DivergenceLawStudy", "Divergence and gain"),
        ("duration", "duration:DurationStudy", "Training length, with and without frozen blocks"),
        ("freeze", "freeze:FreezeStudy", "Frozen depth against the fusion gain"),
        ("heterogeneous", "heterogeneous:HeterogeneousStudy", "Contributors' different recipes"),
        ("maturity", "maturity:MaturityStudy", "Bases of several ages"),
        ("pilot", "pilot:PilotStudy", "Forecasts from a tenth of the steps, scored"),
        ("published", "published:PublishedStudy", "Forecasts of the published runs, scored"),
        ("monolithic", "monolithic:MonolithicStudy", "Pooling the data instead, at equal cost"),
        ("real-base", "real_base:RealBaseStudy", "The whole way on a pretrained base"),
        ("routers", "routers:RoutersStudy", "Every router and every baseline in one table"),
        ("scaling", "scaling:ScalingStudy", "From two to five specialists"),
        ("shared-init", "shared_init:SharedInitStudy", "Contributors' different checkpoints"),
        ("twenty", "twenty:TwentyStudy", "Twenty contributors on one machine, and one more"),
    ):
        register(name, f"molora_studies.kalavai.{target}", summary=summary, source=_PAPER)
