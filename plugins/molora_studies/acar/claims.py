"""The paper's claims beside our figures, and our own claims of the calibrated policy.

A verdict needs both intervals: over seeds, whose models are trained anew, and over tasks. Three
seeds are few, so that much stays undecided.
"""

from collections.abc import Mapping

from molora_studies.acar.findings import Findings
from molora_studies.acar.measures import Estimate
from molora_studies.framework.contract import Claim, Verdict
from molora_studies.verdicts import (
    compute_span,
    join_verdicts,
    judge_above,
    judge_below,
    judge_within,
    name_unit,
)

__all__ = ["list_claims"]

WEAK = 0.3
"""Rank correlations below this are weak, by the usual reading."""

_SPREAD_PP = 30.0
"""Families differ strongly if shares of escalation differ by more than this."""


def list_claims(found: Findings, gains: Mapping[str, Estimate]) -> list[Claim]:
    """All claims, in the paper's order, then ours.

    Args:
        found: Outcomes of all seeds.
        gains: Area under each calibrated policy's frontier less the plain rule's, as a share.
    """
    unit = f"{name_unit('training seed', len(found.results))}, and task at fixed models"
    return [
        *_claim_ensembles(found, unit),
        *_claim_escalation(found, unit),
        *_claim_negatives(found, unit),
        *_claim_calibration(found, gains, unit),
    ]


def _decide(one: Estimate, *, expected: float | None = None, sign: int = 1) -> Verdict:
    """A verdict on a difference: its sign by both intervals, then its size by that over seeds.

    Args:
        one: The difference.
        expected: The published one, in its unit.
        sign: 1 if it is claimed to be above 0, -1 if below.
    """
    verdict = (judge_above if sign > 0 else judge_below)(one.spans)
    if verdict != "holds" or expected is None:
        return verdict
    low, high = one.over_seeds.low, one.over_seeds.high
    is_inside = low is not None and high is not None and low <= expected <= high
    return "holds" if is_inside else "differs"


def _claim_ensembles(found: Findings, unit: str) -> list[Claim]:
    claims = []
    for name, other, words, size in (
        ("arena-2", "single", "Two models are right more often than one", 9.0),
        ("arena-3", "arena-2", "Three models are right more often than two", 9.2),
    ):
        difference = found.difference(name, other).scale(100)
        claims.append(
            Claim(
                f"{words}.",
                f"+{size:.1f} pp",
                difference.show_both("pp"),
                _decide(difference, expected=size),
                unit,
                "On the same tasks; the judge selects among the members' answers.",
            )
        )
    return claims


def _claim_escalation(found: Findings, unit: str) -> list[Claim]:
    rule = found.difference("ACAR-U", "arena-2").scale(100)
    equal = found.at_equal_cost("ACAR-U").scale(100)
    cost, two = found.mean("ACAR-U", "cost"), found.mean("arena-2", "cost")
    avoided = found.sigma_shares()["1"]
    part = Estimate(
        100 - 100 * avoided.point,
        100 - 100 * avoided.high,
        100 - 100 * avoided.low,
        tuple(100 - 100 * one for one in avoided.by_seed),
    )
    shares = {family: modes[0] for family, modes in found.modes_by_family("ACAR-U").items()}
    least, most = min(shares, key=lambda f: shares[f]), max(shares, key=lambda f: shares[f])
    spread = compute_span(
        many - few
        for many, few in zip(
            found.probe_alone_by_seed("ACAR-U", most),
            found.probe_alone_by_seed("ACAR-U", least),
            strict=True,
        )
    )
    return [
        Claim(
            "Escalation by disagreement is right more often than two models always.",
            "+1.2 pp (55.6 against 54.4 %)",
            rule.show_both("pp"),
            _decide(rule, expected=1.2),
            unit,
            f"At {cost.show(2)} of the single model's cost, two models always at {two.show(2)}.",
        ),
        Claim(
            "At equal cost, escalation is right more often than two models always.",
            "+1.2 pp at about the same price",
            equal.show_both("pp"),
            _decide(equal),
            unit,
            "Against one, two and three models always, mixed at random to the same cost.",
        ),
        Claim(
            "The full ensemble is avoided on more than half of the tasks.",
            "54.2 %",
            part.show_both("%"),
            judge_above(part.spans, 50),
            unit,
            "Tasks on which at least two of the probe's samples agree.",
        ),
        Claim(
            "Escalation differs strongly between sorts of tasks.",
            "42 % stay single on SuperGPQA; 4 to 7 % on MathArena and LiveCodeBench",
            f"{shares[most]:.1f} % of {most}, {shares[least]:.1f} % of {least} stay with the "
            f"probe: {shares[most] - shares[least]:.1f} pp {spread.show(1, sign=False)} over "
            f"{len(found.results)} seeds",
            judge_above([spread], _SPREAD_PP),
            name_unit("training seed", len(found.results)),
            f"Verdict by a spread of more than {_SPREAD_PP:g} pp between these two families.",
        ),
    ]


def _claim_negatives(found: Findings, unit: str) -> list[Claim]:
    always = found.difference("ACAR-UJ always", "ACAR-U").scale(100)
    near = found.difference("ACAR-UJ", "ACAR-U").scale(100)
    below = found.difference("ACAR-U", "arena-3").scale(100)
    wrong = found.agreement_but_wrong()
    proxies = found.proxies()
    told = "; ".join(f"{name} {one.show_both('', 2)}" for name, one in proxies.items())
    return [
        Claim(
            "Retrieved examples lower the accuracy.",
            "-3.4 pp, median similarity 0.167",
            f"{always.show_both('pp')} with the nearest example always; "
            f"{near.show_both('pp')} above the threshold; median similarity "
            f"{found.similarity():.2f}",
            _decide(always, expected=-3.4, sign=-1),
            unit,
            "Verdict on the example that is always there, as in the paper.",
        ),
        Claim(
            "Agreement on a wrong answer keeps escalation below the full ensemble.",
            "about 8 pp below",
            f"{wrong['lost'].scale(-100).show_both('pp')} on tasks the probe agrees on, of which "
            f"{100 * wrong['of agreed'].point:.1f} % are wrong; {below.show_both('pp')} on all "
            "tasks",
            _decide(wrong["lost"].scale(-100), expected=-8.0, sign=-1),
            unit,
            "Verdict on the agreed tasks; the rest is lost where two members verify.",
        ),
        Claim(
            "Proxies correlate weakly with leave-one-out values.",
            "weak",
            f"Spearman {told}",
            join_verdicts([judge_within(one.spans, WEAK) for one in proxies.values()]),
            unit,
            f"Verdict by |rho| < {WEAK:g} for both proxies, intervals included.",
        ),
    ]


def _claim_calibration(found: Findings, gains: Mapping[str, Estimate], unit: str) -> list[Claim]:
    area, blind = (gains[name].scale(100) for name in ("calibrated", "calibrated, families hidden"))
    at_budget = found.difference("calibrated", "ACAR-U").scale(100)
    own, rule = found.mean("calibrated", "cost"), found.mean("ACAR-U", "cost")
    wrong = found.agreement_but_wrong()
    escalated = wrong["won back"].scale(100)
    return [
        Claim(
            "A calibrated policy beats the plain rule over all budgets.",
            "our own claim",
            f"{area.show_both('pp', 2)}, mean accuracy between the cost of the probe alone and "
            f"that of all members; families hidden {blind.show_both('pp', 2)}",
            _decide(area),
            unit,
            "Area under the accuracy-cost frontier; the plain rule escalates in the order of "
            "sigma, mixed at random.",
        ),
        Claim(
            "At the plain rule's budget the calibrated policy is right more often.",
            "our own claim",
            f"{at_budget.show_both('pp')} at {own.point:.2f} of the single model's cost against "
            f"{rule.point:.2f}",
            _decide(at_budget),
            unit,
            "The budget is what the plain rule costs on calibration tasks.",
        ),
        Claim(
            "It wins back what agreement on wrong answers loses.",
            "our own claim",
            f"{escalated.show_both('pp')} on tasks with sigma 0; three members always "
            f"{wrong['lost'].scale(100).show_both('pp')}",
            _decide(escalated),
            unit,
            "Right answers more than the probe's there, as a share of all tasks.",
        ),
    ]
