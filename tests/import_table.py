"""Which place of the product may import which others; docs/architecture.md shows the same."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {
    "molora_fed": REPOSITORY / "molora_fed",
    "molora_cli": REPOSITORY / "cli" / "molora_cli",
    "molora_kalavai": REPOSITORY / "plugins" / "molora_kalavai",
    "molora_evolution": REPOSITORY / "plugins" / "molora_evolution",
    "molora_acar": REPOSITORY / "plugins" / "molora_acar",
    "molora_studies": REPOSITORY / "plugins" / "molora_studies",
}


_MEASURING = "corpus models adapters bank routing evaluation"
_BELOW_COOPERATIVE = (
    f"{_MEASURING} tracing privacy training contributions forecasting fusion population reporting"
)

# What a place may import besides the root's modules and storage, lowest place first.
ALLOWED: dict[str, str] = {
    "root": "",
    "storage": "",
    "corpus": "",
    "models": "",
    "tracing": "",
    "privacy": "corpus",
    "adapters": "models",
    "training": "corpus models adapters",
    "contributions": "corpus models adapters",
    "bank": "corpus models adapters",
    "routing": "models adapters bank",
    "forecasting": "contributions",
    "evaluation": "bank routing forecasting",
    # `contributions`: a plan is made of contributions, with the samples that came with them.
    "fusion": "corpus models adapters contributions bank routing forecasting evaluation privacy",
    "population": f"{_MEASURING} contributions training",
    "inference": f"{_MEASURING} population",
    "reporting": "contributions forecasting population",
    "export": f"{_MEASURING} population inference reporting",
    "cooperative": _BELOW_COOPERATIVE,
    "serving": f"{_MEASURING} population inference",
    "federation": f"{_BELOW_COOPERATIVE} inference cooperative serving",
    "cascade": f"{_BELOW_COOPERATIVE} inference cooperative serving",
    # It may build a whole cooperative; nobody's way to a result goes through it.
    "testing": f"{_BELOW_COOPERATIVE} cooperative cascade",
    "demo": f"{_BELOW_COOPERATIVE} inference cooperative serving federation",
    # The public face hands names on from wherever they are; who imports one of them from
    # `molora_fed` counts as importing it from there.
    "face": (
        f"{_BELOW_COOPERATIVE} inference testing export cooperative serving federation cascade"
    ),
    "molora_kalavai": f"{_MEASURING} contributions forecasting",
    "molora_evolution": f"{_MEASURING} training population",
    "molora_acar": "cascade",
}
ALLOWED["molora_cli"] = " ".join(ALLOWED)
ALLOWED["molora_studies"] = " ".join(ALLOWED)
