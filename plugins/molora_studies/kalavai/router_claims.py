"""What the study of routers holds against the paper, claim by claim."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora_studies.framework.contract import Claim, Verdict
from molora_studies.kalavai.comparisons import judge_sign, judge_within, show_interval
from molora_studies.kalavai.method_table import read_gain_interval

__all__ = ["EQUAL_NATS", "LINEAR_BASE", "collect_claims", "list_pairs"]

EQUAL_NATS = 0.01
"""Losses closer than this count as equal: a third of a percent of the losses measured here."""

_STATISTICS_NATS = 0.03

LINEAR_BASE: Mapping[str, Mapping[str, Any]] = {
    "linear-base": {"router": "linear", "input": "base_hidden"},
    "linear-base-long": {"router": "linear", "input": "base_hidden", "steps": 2000, "restarts": 2},
    "linear-base-fast": {"router": "linear", "input": "base_hidden", "learning_rate": 0.01},
}
"""Causal linear routers that read what `statistics` reads; the best of them is its measure."""


def list_pairs(
    form: str, routers: Mapping[str, Any], rivals: Sequence[str]
) -> list[tuple[str, str]]:
    """Methods whose differences claims rest on.

    Args:
        form: "ours" or "as published".
        routers: Labels of the routers fused.
        rivals: Models trained beside.
    """
    wanted = {
        "ours": [
            *(("fused:statistics", f"fused:{label}") for label in LINEAR_BASE),
            ("fused:evidence", "fused:linear"),
            ("fused:evidence-hidden", "fused:evidence"),
            *(("fused:evidence", rival) for rival in rivals),
            *(("fused:linear", rival) for rival in rivals),
        ],
        "as published": [
            ("fused:mlp", "fused:linear"),
            ("fused:hard", "fused:linear"),
            ("fused:linear", "fused:linear-noncausal"),
        ],
    }
    known = {f"fused:{label}" for label in routers} | set(rivals)
    return [pair for pair in wanted[form] if set(pair) <= known]


class _Reader:
    """Figures of both forms, means over seeds."""

    def __init__(self, results: Mapping[str, Mapping[str, Any]], seeds: int) -> None:
        self.results = results
        self.seeds = f"{seeds} seed{'s' if seeds > 1 else ''}"

    def gain(self, form: str, method: str) -> dict[str, float] | None:
        """Gain on the best specialist, the paper's reference."""
        evaluation = self.results[f"{form}, mean"]["evaluation"]
        if method not in evaluation["equal_weight"]:
            return None
        return read_gain_interval(evaluation, method, "best_specialist")

    def gap(self, form: str, label: str) -> dict[str, float] | None:
        """Loss above the domain oracle."""
        gaps: Mapping[str, dict[str, float]] = self.results[f"{form}, mean"]["evaluation"][
            "oracle_gap_nats"
        ]
        return gaps.get(label)

    def difference(self, form: str, one: str, other: str) -> dict[str, float] | None:
        """Loss of one method minus another's."""
        found: Mapping[str, dict[str, float]] = self.results[f"{form}, differences"]["differences"]
        return found.get(f"{one} - {other}")

    def percent(self, interval: Mapping[str, float]) -> str:
        """As text."""
        return f"{show_interval(interval, '%')}, {self.seeds}"

    def nats(self, interval: Mapping[str, float]) -> str:
        """As text."""
        return f"{show_interval(interval, 'nats', digits=4)}, {self.seeds}"


def collect_claims(
    options: Any,
    results: Mapping[str, Mapping[str, Any]],
) -> list[Claim]:
    """All claims whose methods were measured.

    Args:
        options: The study's options.
        results: Results by cell.
    """
    reader = _Reader(results, len(options.seeds))
    return [
        *_claim_signs(reader),
        *_claim_equal_routers(reader),
        *_claim_oracle(reader),
        *_claim_statistics(reader),
        *_claim_ours(reader),
    ]


def _claim_signs(reader: _Reader) -> list[Claim]:
    """Who gains and who loses against the best specialist."""
    wanted = (
        ("as published", "fused:uniform", "Equal gates lose", "-1.19 %", False),
        ("as published", "fused:linear-noncausal", "A linear router gains", "+7.70 %", True),
        ("ours", "weight_average", "Averaging weights loses", "-3.4 %", False),
        ("ours", "fused:dispatch", "Dispatch to one specialist loses", "-21.1 % (README)", False),
    )
    claims = []
    for form, method, text, published, positive in wanted:
        gain = reader.gain(form, method)
        if gain is not None:
            claims.append(
                Claim(
                    f"{text} against the best specialist",
                    published,
                    reader.percent(gain),
                    judge_sign(gain, positive=positive),
                    "by the sign of the whole interval; specialists here forget other domains, "
                    "which makes the best specialist easy to beat",
                )
            )
    return claims


def _claim_equal_routers(reader: _Reader) -> list[Claim]:
    parts = {
        label: reader.difference("as published", f"fused:{label}", "fused:linear")
        for label in ("mlp", "hard")
    }
    found = {label: interval for label, interval in parts.items() if interval is not None}
    if not found:
        return []
    verdicts = [judge_within(interval, EQUAL_NATS) for interval in found.values()]
    return [
        Claim(
            "MLP and hard routing are as good as the linear router",
            "+7.72 % and +7.72 % beside +7.70 %",
            "; ".join(f"{label} - linear: {reader.nats(i)}" for label, i in found.items()),
            _worst(verdicts),
            f"equal if the whole interval lies within {EQUAL_NATS} nats, all three causal",
        )
    ]


def _claim_oracle(reader: _Reader) -> list[Claim]:
    wanted = (
        ("as published", "linear-noncausal", "The published router reaches the domain oracle",
         "3e-6 nats above"),
        ("ours", "dispatch", "Dispatch to one specialist reaches the domain oracle",
         "equal in a later table"),
    )  # fmt: skip
    claims = []
    for form, label, text, published in wanted:
        gap = reader.gap(form, label)
        if gap is not None:
            verdict = judge_within(gap, EQUAL_NATS)
            better = gap["high"] < 0
            claims.append(
                Claim(
                    text,
                    published,
                    reader.nats(gap),
                    "holds" if better else verdict,
                    "better than the oracle" if better else f"equal within {EQUAL_NATS} nats",
                )
            )
    noncausal = reader.difference("as published", "fused:linear", "fused:linear-noncausal")
    if noncausal is not None:
        claims.append(
            Claim(
                "Seeing the whole sequence makes the published router's loss too good",
                "not said: the published gate pools over future tokens",
                f"causal - published: {reader.nats(noncausal)}",
                judge_sign(noncausal, positive=True),
                "holds if the causal form's loss is higher by its whole interval",
            )
        )
    return claims


def _claim_statistics(reader: _Reader) -> list[Claim]:
    """Ours: the closed form beside the best linear router on the same states."""
    pairs = {
        label: found
        for label in LINEAR_BASE
        if (found := reader.difference("ours", "fused:statistics", f"fused:{label}")) is not None
    }
    if not pairs:
        return []
    label = max(pairs, key=lambda name: pairs[name]["point"])
    found = pairs[label]
    near: Verdict = (
        "holds" if found["high"] <= _STATISTICS_NATS
        else "does not hold" if found["low"] > _STATISTICS_NATS
        else "not decided"
    )  # fmt: skip
    return [
        Claim(
            f"`statistics` is within {_STATISTICS_NATS} nats of the best causal linear router on "
            "base_hidden",
            "ours; the prototype was 0.01 to 0.035 nats behind",
            f"statistics - {label}: {reader.nats(found)}",
            near,
            f"the best of {len(pairs)} linear routers by held-out loss, which favours it",
        ),
    ]


def _claim_ours(reader: _Reader) -> list[Claim]:
    wanted = (
        ("fused:linear", "wider", "A wider model of as many parameters beats the linear fusion",
         "+10.87 % beside +7.72 %", True),
        ("fused:evidence", "wider", "A wider model of as many parameters beats our fusion",
         "+10.87 % beside +7.72 %", True),
        ("fused:evidence", "joint", "Joint training of experts and router beats our fusion",
         "ours: the upper bound of fusing as in BTX", True),
        ("fused:evidence-hidden", "fused:evidence", "Hidden states help evidence",
         "ours", False),
    )  # fmt: skip
    claims = []
    for one, other, text, published, positive in wanted:
        found = reader.difference("ours", one, other)
        if found is not None:
            names = f"{one.removeprefix('fused:')} - {other.removeprefix('fused:')}"
            claims.append(
                Claim(
                    text,
                    published,
                    f"{names}: {reader.nats(found)}",
                    judge_sign(found, positive=positive),
                    "by the sign of the whole interval of the paired difference in loss",
                )
            )
    return claims


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("does not hold", "differs", "not decided", "holds")
    return min(verdicts, key=order.index)
