"""The paper's claims beside our figures, and our own claims of the calibrated policy."""

from collections.abc import Mapping

from molora_studies.acar.findings import Findings
from molora_studies.acar.measures import Estimate
from molora_studies.framework.contract import Claim, Verdict

__all__ = ["list_claims"]

WEAK = 0.3
"""Rank correlations below this are weak, by the usual reading."""


def list_claims(found: Findings, gains: Mapping[str, Estimate]) -> list[Claim]:
    """All claims, in the paper's order, then ours.

    Args:
        found: Outcomes of all seeds.
        gains: Area under each calibrated policy's frontier less the plain rule's, as a share.
    """
    seeds = f"{len(found.results)} seeds"
    return [
        *_claim_ensembles(found, seeds),
        *_claim_escalation(found, seeds),
        *_claim_negatives(found, seeds),
        *_claim_calibration(found, gains, seeds),
    ]


def _decide(one: Estimate, *, expected: float | None = None, sign: int = 1) -> Verdict:
    """A verdict on a difference: its sign by the interval, then its size."""
    low, high = sorted((sign * one.low, sign * one.high))
    if high < 0:
        return "does not hold"
    if low <= 0:
        return "not decided"
    is_other = expected is not None and not one.low <= expected <= one.high
    return "differs" if is_other else "holds"


def _claim_ensembles(found: Findings, seeds: str) -> list[Claim]:
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
                f"{difference.show(sign='+')} pp, {seeds}",
                _decide(difference, expected=size),
                "On the same tasks; the judge selects among the members' answers.",
            )
        )
    return claims


def _claim_escalation(found: Findings, seeds: str) -> list[Claim]:
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
    return [
        Claim(
            "Escalation by disagreement is right more often than two models always.",
            "+1.2 pp (55.6 against 54.4 %)",
            f"{rule.show(sign='+')} pp, {seeds}",
            _decide(rule, expected=1.2),
            f"At {cost.show(2)} of the single model's cost, two models always at {two.show(2)}.",
        ),
        Claim(
            "At equal cost, escalation is right more often than two models always.",
            "+1.2 pp at about the same price",
            f"{equal.show(sign='+')} pp, {seeds}",
            _decide(equal),
            "Against one, two and three models always, mixed at random to the same cost.",
        ),
        Claim(
            "The full ensemble is avoided on more than half of the tasks.",
            "54.2 %",
            f"{part.show()} %, {seeds}",
            "holds" if part.low > 50 else "does not hold" if part.high < 50 else "not decided",
            "Tasks on which at least two of the probe's samples agree.",
        ),
        Claim(
            "Escalation differs strongly between sorts of tasks.",
            "42 % stay single on SuperGPQA; 4 to 7 % on MathArena and LiveCodeBench",
            f"{shares[most]:.1f} % of {most}, {shares[least]:.1f} % of {least} stay with the "
            f"probe, {seeds}",
            "holds" if shares[most] - shares[least] > 30 else "does not hold",
            "Verdict by a spread of more than 30 pp between families.",
        ),
    ]


def _claim_negatives(found: Findings, seeds: str) -> list[Claim]:
    always = found.difference("ACAR-UJ always", "ACAR-U").scale(100)
    near = found.difference("ACAR-UJ", "ACAR-U").scale(100)
    below = found.difference("ACAR-U", "arena-3").scale(100)
    wrong = found.agreement_but_wrong()
    proxies = found.proxies()
    strongest = max(proxies.values(), key=lambda one: abs(one.point))
    reach = max(abs(end) for one in proxies.values() for end in (one.low, one.high))
    told = ", ".join(f"{name} {one.show(2, '+')}" for name, one in proxies.items())
    return [
        Claim(
            "Retrieved examples lower the accuracy.",
            "-3.4 pp, median similarity 0.167",
            f"{always.show(sign='+')} pp with the nearest example always, {near.show(sign='+')} pp "
            f"above the threshold, median similarity {found.similarity():.2f}, {seeds}",
            _decide(always, expected=-3.4, sign=-1),
            "Verdict on the example that is always there, as in the paper.",
        ),
        Claim(
            "Agreement on a wrong answer keeps escalation below the full ensemble.",
            "about 8 pp below",
            f"{wrong['lost'].scale(-100).show(sign='+')} pp on tasks the probe agrees on, of which "
            f"{wrong['of agreed'].scale(100).show()} % are wrong; {below.show(sign='+')} pp on "
            f"all tasks, {seeds}",
            _decide(wrong["lost"].scale(-100), expected=-8.0, sign=-1),
            "Verdict on the agreed tasks; the rest is lost where two members verify.",
        ),
        Claim(
            "Proxies correlate weakly with leave-one-out values.",
            "weak",
            f"Spearman {told}, {seeds}",
            "holds"
            if reach < WEAK
            else "does not hold"
            if abs(strongest.point) > WEAK
            else "not decided",
            f"Verdict by |rho| < {WEAK:g} for both proxies, intervals included.",
        ),
    ]


def _claim_calibration(found: Findings, gains: Mapping[str, Estimate], seeds: str) -> list[Claim]:
    area, blind = (gains[name].scale(100) for name in ("calibrated", "calibrated, families hidden"))
    at_budget = found.difference("calibrated", "ACAR-U").scale(100)
    own, rule = found.mean("calibrated", "cost"), found.mean("ACAR-U", "cost")
    wrong = found.agreement_but_wrong()
    escalated = wrong["won back"].scale(100)
    return [
        Claim(
            "A calibrated policy beats the plain rule over all budgets.",
            "our own claim",
            f"{area.show(2, '+')} pp mean accuracy between the cost of the probe alone and that of "
            f"all members; families hidden {blind.show(2, '+')} pp, {seeds}",
            _decide(area),
            "Area under the accuracy-cost frontier; the plain rule escalates in the order of "
            "sigma, mixed at random.",
        ),
        Claim(
            "At the plain rule's budget the calibrated policy is right more often.",
            "our own claim",
            f"{at_budget.show(sign='+')} pp at {own.show(2)} of the single model's cost against "
            f"{rule.show(2)}, {seeds}",
            _decide(at_budget),
            "The budget is what the plain rule costs on calibration tasks.",
        ),
        Claim(
            "It wins back what agreement on wrong answers loses.",
            "our own claim",
            f"{escalated.show(sign='+')} pp on tasks with sigma 0, three members always "
            f"{wrong['lost'].scale(100).show(sign='+')} pp, {seeds}",
            _decide(escalated),
            "Right answers more than the probe's there, as a share of all tasks.",
        ),
    ]
