"""ACAR (arXiv 2602.21231), escalation by disagreement, on molora-fed's public hooks."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register

_PAPER = "arXiv 2602.21231"


@hookimpl
def register_extractors(register: Register) -> None:
    """Register one extractor a sort of answer."""
    for name, attr, summary in (
        ("number", "extract_number", "The number after the answer marker, or the last one"),
        ("choice-letter", "extract_choice", "The letter of a multiple choice"),
        ("exact-text", "extract_exact_text", "The whole text, case and punctuation included"),
        (
            "normalised-text",
            "extract_text",
            "The first line, without case, outer punctuation and repeated spaces",
        ),
        ("sequence", "extract_sequence", "The items of the first line, numbers reduced"),
        ("json-field", "extract_json_field", "A field of the last JSON value, canonical"),
    ):
        register(
            name,
            f"molora_acar.extractors:{attr}",
            summary=summary,
            source=f"{_PAPER}; own definition, see docs/extractors_judges.md",
        )
    register(
        "code-tests",
        "molora_acar.code_answers:extract_code",
        summary="What a program returns on the task's inputs, run in a locked-down process",
        source=f"{_PAPER}; own definition, see docs/extractors_judges.md",
    )


@hookimpl
def register_judges(register: Register) -> None:
    """Register what selects an answer where all members gave one."""
    register(
        "majority",
        "molora_acar.judges:MajorityJudge",
        summary="The answer most candidates gave, the earliest of equals",
        source=f"{_PAPER}; own definition, see docs/extractors_judges.md",
    )
    register(
        "likelihood",
        "molora_acar.judges:LikelihoodJudge",
        summary="The answer that a model, such as the fused one, finds likeliest",
        source="own definition, see docs/extractors_judges.md",
    )
    register(
        "pairwise",
        "molora_acar.judges:PairwiseJudge",
        summary="The answer that wins most pairs, each judged by a model that gave neither",
        source="own definition, see docs/extractors_judges.md",
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
    register(
        "always",
        "molora_acar.policies:AlwaysPolicy",
        summary="One mode for every task",
        source=f"{_PAPER}, the baselines",
    )
    register(
        "calibrated",
        "molora_acar.policies:CalibratedPolicy",
        summary="The mode worth most at a budget, by a table fitted on held-out tasks",
        source="own derivation, see docs/extractors_judges.md",
    )


@hookimpl
def register_task_families(register: Register) -> None:
    """Register families of tasks with checkable answers; none needs a download."""
    for name, summary in (
        ("arithmetic", "Sums, differences and products of whole numbers"),
        ("choices", "Which built-in domain a piece of text is from, four choices"),
        ("code", "A Python expression from its description, checked by unit tests"),
        ("logic", "Truth values of three expressions"),
        ("sequences", "The next number of a sequence"),
        ("sorting", "Digits and numbers in order"),
        ("strings", "Operations on letters of made-up words"),
    ):
        register(
            name,
            f"molora_acar.tasks.families:{name}",
            summary=summary,
            source="own definition, see docs/tasks.md",
        )
