"""What `adapter-regime` says: bytes, gain kept, and whether LoRA can fuse."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora_studies.framework.contract import Claim, Figure, Summary, Table, Verdict
from molora_studies.kalavai.conditions import estimate
from molora_studies.verdicts import Span, compute_span, judge_above, name_unit

__all__ = ["summarise_adapters"]

Row = tuple[Mapping[str, Any], Mapping[str, Any]]
"""A cell's labels and result."""

_PUBLISHED_LORA = "divergence -1.5, -5.6, -12.1, -20.3 % at rank 8, 16, 32, 64 (attention only)"


def summarise_adapters(
    rows: Sequence[Row], *, kept_percent: float, bytes_percent: float
) -> Summary:
    """Summary of the cells of `adapter-regime`.

    Args:
        rows: Labels and result of each cell.
        kept_percent: Share of the full gain that an adapter must keep.
        bytes_percent: Share of the full difference's bytes aimed at.
    """
    fusions = [(labels, result) for labels, result in rows if labels["part"] == "fusion"]
    screened = _average_screening([row for row in rows if row[0]["part"] == "screening"])
    recipes = _average_recipes([row for row in rows if row[0]["part"] == "recipe"])
    return Summary(
        findings={
            "fusions": [{**labels, **_describe_fusion(result)} for labels, result in fusions],
            "screening": screened,
            "recipes": recipes,
        },
        claims=[
            *_claim_smallest(fusions, kept_percent, bytes_percent),
            *_claim_published(fusions, kept_percent, bytes_percent),
            *_claim_lora(fusions, [row for row in rows if row[0]["part"] == "recipe"]),
        ],
        tables=[_table_fusions(fusions), _table_screening(screened), _table_recipes(recipes)],
        figures=[
            Figure(
                "bytes",
                "Share of full fine-tuning's fusion gain kept, by the size of the adapters. "
                "Bars are 95 % intervals by document cluster of the mean over seeds.",
                lambda figure: _draw(figure, fusions, kept_percent, bytes_percent),
            )
        ],
        notes=[
            "Gains are measured from one reference, the best alone of full fine-tuning's own "
            "cooperative. The published gain takes each fusion's own best specialist; compression "
            "changes that one, too, so that both shares are given.",
            "Bytes are those of the weights files; full fine-tuning is shipped as float32 "
            "differences of all linear layers. bfloat16 would halve it.",
            "Screening reads validation blocks at the first seed. The default confirmed adapters "
            "were chosen from it before any held-out block of this study was read: at D=768 from "
            "one domain, and its int2 from the screening at D=192. Which of the confirmed is the "
            "smallest that keeps enough is read off the held-out blocks.",
            "Rates of the specialists were not tuned: the kinds' defaults, and 3e-4 for full "
            "fine-tuning at D=768. Recipes at one seed carry no claim. The base at D=768 is young "
            "(400 steps) and its specialists are short (100 steps).",
            "svd leaves out the changes of biases that full fine-tuning made.",
        ],
    )


def _describe_fusion(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "bytes_percent": 100.0 * result["bytes"] / result["full_bytes"]}


def _average_screening(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Share of full fine-tuning's own improvement kept, mean over domains, by size and variant."""
    sizes: dict[str, list[Mapping[str, Any]]] = {}
    for labels, result in rows:
        sizes.setdefault(labels["size"], []).append(result)
    found = []
    for size, results in sizes.items():
        for label in results[0]["variants"]:
            pairs = [(r, r["variants"][label]) for r in results]
            shares = [100.0 * v["bytes"] / r["full_bytes"] for r, v in pairs]
            kept = [
                100.0 * (r["base_loss"] - v["loss"]) / (r["base_loss"] - r["full_loss"])
                for r, v in pairs
            ]
            found.append(
                {
                    "size": size,
                    "variant": label,
                    "bytes_percent": sum(shares) / len(shares),
                    "kept_percent": sum(kept) / len(kept),
                    "lowest_kept_percent": min(kept),
                    "domains": len(kept),
                }
            )
    return found


def _average_recipes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Divergence of best and last weights, mean over domains and seeds, by size and recipe."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for labels, result in rows:
        groups.setdefault((labels["size"], labels["recipe"]), []).append((labels, result))
    found = []
    for (size, recipe), members in groups.items():
        results = [result for _, result in members]
        best = [_fall(r["base_loss"], r["loss"]) for r in results]
        last = [_fall(r["initial_loss"], r["curve"][-1][1]) for r in results]
        found.append(
            {
                "size": size,
                "recipe": recipe,
                "divergence_percent": sum(best) / len(best),
                "last_divergence_percent": sum(last) / len(last),
                "best_step": sum(r["best_step"] for r in results) / len(results),
                "steps": results[0]["curve"][-1][0],
                "adapter_bytes": sum(r["adapter_bytes"] for r in results) / len(results),
                "domains": len({labels["domain"] for labels, _ in members}),
                "seeds": len({labels["seed"] for labels, _ in members}),
            }
        )
    return found


def _fall(before: float, after: float) -> float:
    return 100.0 * (before - after) / before


def _claim_smallest(
    fusions: Sequence[Row], kept_percent: float, bytes_percent: float
) -> list[Claim]:
    """One claim a size: the smallest adapter that keeps enough, by all of its intervals."""
    claims = []
    for size in dict.fromkeys(labels["size"] for labels, _ in fusions):
        own = [(labels, _describe_fusion(r)) for labels, r in fusions if labels["size"] == size]
        most_seeds = max(result["seeds"] for _, result in own)
        own = [row for row in own if row[1]["seeds"] == most_seeds]
        judged = [(row, judge_above(_list_spans(row[1]), kept_percent)) for row in own]
        small = [pair for pair in judged if pair[0][1]["bytes_percent"] <= bytes_percent]
        enough = [row for row, verdict in judged if verdict == "holds"]
        smallest = min(enough, key=lambda row: row[1]["bytes_percent"], default=None)
        most_kept = max(
            [row for row, _ in small or judged], key=lambda row: row[1]["kept_percent"]["point"]
        )
        shown, verdict = smallest or most_kept, _judge_smallest([v for _, v in small], judged)
        if verdict == "not decided":
            shown = most_kept
        claims.append(
            Claim(
                f"{size}: an adapter of at most {bytes_percent:g} % of the full difference's bytes "
                f"keeps {kept_percent:g} % of full fine-tuning's fusion gain",
                "no figure (our aim)",
                f"{'' if shown is smallest else 'most kept: '}{_show_kept(*shown)}",
                verdict,
                f"{name_unit('training seed', most_seeds)}, and document cluster of the mean",
                "the smallest adapter whose intervals, over seeds and by document cluster, lie "
                "above the share asked for"
                if shown is smallest
                else "no adapter of this size has all intervals above the share asked for",
            )
        )
    return claims


def _judge_smallest(small: Sequence[Verdict], judged: Sequence[tuple[Row, Verdict]]) -> Verdict:
    """Whether a small adapter keeps enough; `differs` if only larger ones do.

    Args:
        small: Verdicts of adapters within the size asked for.
        judged: All adapters with their verdicts.
    """
    every = [verdict for _, verdict in judged]
    if "holds" in small:
        return "holds"
    if "not decided" in small or (not small and "not decided" in every and "holds" not in every):
        return "not decided"
    return "differs" if "holds" in every else "does not hold"


def _list_spans(result: Mapping[str, Any]) -> list[Span]:
    """Intervals of the share kept, percent: over seeds, and by document cluster."""
    return [compute_span(result["kept_percent_by_seed"]), Span.of(result["kept_percent"])]


def _claim_published(
    fusions: Sequence[Row], kept_percent: float, bytes_percent: float
) -> list[Claim]:
    """The same by the published gain: each fusion on the best of its own specialists."""
    claims = []
    for size in dict.fromkeys(labels["size"] for labels, _ in fusions):
        own = [(labels, _describe_fusion(r)) for labels, r in fusions if labels["size"] == size]
        most_seeds = max(result["seeds"] for _, result in own)
        shares = {
            labels["variant"]: (result["bytes_percent"], estimate(_published_shares(result)))
            for labels, result in own
            if result["seeds"] == most_seeds and result["bytes_percent"] <= bytes_percent
        }
        if not shares:
            continue
        enough = {v: found for v, found in shares.items() if found[1].mean >= kept_percent}
        variant = (
            min(enough, key=lambda v: enough[v][0])
            if enough
            else max(shares, key=lambda v: shares[v][1].mean)
        )
        size_percent, share = shares[variant]
        claims.append(
            Claim(
                f"{size}: the same share of the published gain, each fusion on the best of its "
                "own specialists",
                "no figure (our aim)",
                f"{variant}: {share.show(sign=False, digits=1)} with {size_percent:.1f} % of the "
                "bytes",
                judge_above([Span.of(share)], kept_percent),
                name_unit("training seed", share.count),
                "compression changes the best specialist, the reference, too; interval over seeds",
            )
        )
    return claims


def _published_shares(result: Mapping[str, Any]) -> list[float]:
    """Small over full gain on the best of own specialists, percent by seed."""
    gains = result["gains"]
    return [
        100.0 * small["best_specialist"] / full["best_specialist"]
        for small, full in zip(gains["small"], gains["full"], strict=True)
    ]


def _claim_lora(fusions: Sequence[Row], recipes: Sequence[Row]) -> list[Claim]:
    """Whether specialists of LoRA improve on the base, and their fusion on the best alone.

    Recipes that were only screened carry no claim.

    Args:
        fusions: Labels and results of fusions.
        recipes: Labels and results of trainings, one a domain and seed.
    """
    claims = []
    confirmed = max((result["seeds"] for _, result in fusions), default=0)
    for labels, result in fusions:
        if not labels["variant"].startswith("lora") or result["seeds"] < confirmed:
            continue
        by_seed: dict[int, list[float]] = {}
        for trained, record in recipes:
            if (trained["size"], trained["recipe"]) == (labels["size"], labels["variant"]):
                fall = _fall(record["base_loss"], record["loss"])
                by_seed.setdefault(trained["seed"], []).append(fall)
        divergence = estimate(sum(falls) / len(falls) for falls in by_seed.values())
        own = estimate(gains["best_alone"] for gains in result["gains"]["small"])
        fuses = judge_above([Span.of(divergence), Span.of(own)])
        improves = judge_above([Span.of(divergence)])
        verdict: Verdict = "not decided"
        if fuses == "holds":
            verdict = "does not hold"
        elif improves == "does not hold":
            verdict = "holds"
        claims.append(
            Claim(
                f"{labels['size']}, {labels['variant']}: LoRA specialists do not improve on the "
                "base and so cannot be fused",
                _PUBLISHED_LORA,
                f"divergence {divergence.show()}, gain on its best alone {own.show()}",
                verdict,
                name_unit("training seed", own.count),
                "refuted if the intervals of divergence and gain lie above 0; stopped by "
                "validation; the published recipe ran a fixed number of steps over little text",
            )
        )
    return claims


def _show_kept(labels: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    over_seeds, over_documents = (span.show(1, sign=False) for span in _list_spans(result))
    seeds = result["seeds"]
    return (
        f"{labels['variant']}: {result['kept_percent']['point']:.1f} % {over_seeds} over {seeds} "
        f"seed{'s' if seeds > 1 else ''}, {over_documents} over documents, of the gain with "
        f"{result['bytes_percent']:.1f} % of the bytes"
    )


def _table_fusions(fusions: Sequence[Row]) -> Table:
    rows = []
    for labels, raw in fusions:
        result = _describe_fusion(raw)
        kept = result["kept_percent"]
        rows.append(
            (
                labels["size"],
                labels["variant"],
                f"{result['bytes_percent']:.1f}",
                f"{kept['point']:.1f} [{kept['low']:.1f}, {kept['high']:.1f}]",
                f"{min(result['kept_percent_by_seed']):.1f}",
                estimate(result["small_gain_percent_by_seed"]).show(),
                estimate(result["full_gain_percent_by_seed"]).show(),
                _show_published(result["gains"]),
            )
        )
    return Table(
        "Fusion gain kept by small adapters (held-out blocks)",
        ("base", "adapter", "bytes, % of full", "gain kept, %", "lowest seed, %", "its gain",
         "full gain", "on own best specialist: its / full"),
        rows,
    )  # fmt: skip


def _show_published(gains: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Gains as the paper measures them: each fusion on the best of its own specialists."""
    shown = [estimate(g["best_specialist"] for g in gains[side]) for side in ("small", "full")]
    return " / ".join(f"{one.mean:+.2f} %" for one in shown)


def _table_screening(screened: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        "Screening: share of full fine-tuning's own-domain improvement kept (validation blocks)",
        ("base", "adapter", "bytes, % of full", "kept, %", "lowest domain, %"),
        [
            (
                row["size"],
                row["variant"],
                f"{row['bytes_percent']:.1f}",
                f"{row['kept_percent']:.1f}",
                f"{row['lowest_kept_percent']:.1f}",
            )
            for row in screened
        ],
    )


def _table_recipes(recipes: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        "LoRA recipes: divergence on validation blocks, best weights and last ones",
        ("base", "recipe", "best, %", "last, %", "best step", "steps", "domains x seeds"),
        [
            (
                row["size"],
                row["recipe"],
                f"{row['divergence_percent']:+.2f}",
                f"{row['last_divergence_percent']:+.2f}",
                f"{row['best_step']:.0f}",
                str(row["steps"]),
                f"{row['domains']} x {row['seeds']}",
            )
            for row in recipes
        ],
    )


def _draw(figure: Any, fusions: Sequence[Row], kept_percent: float, bytes_percent: float) -> None:
    axes = figure.subplots()
    for size in dict.fromkeys(labels["size"] for labels, _ in fusions):
        own = [(n, _describe_fusion(r)) for n, r in fusions if n["size"] == size]
        points = [result["kept_percent"]["point"] for _, result in own]
        low = [max(0.0, r["kept_percent"]["point"] - r["kept_percent"]["low"]) for _, r in own]
        high = [max(0.0, r["kept_percent"]["high"] - r["kept_percent"]["point"]) for _, r in own]
        sizes = [result["bytes_percent"] for _, result in own]
        axes.errorbar(sizes, points, yerr=[low, high], fmt="o", capsize=3, label=size)
        for (labels, _), x, y in zip(own, sizes, points, strict=True):
            axes.annotate(labels["variant"], (x, y), xytext=(4, -9), textcoords="offset points",
                          fontsize=7)  # fmt: skip
    axes.axhline(kept_percent, linestyle=":", linewidth=1)
    axes.axvline(bytes_percent, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("bytes, % of the full difference")
    axes.set_ylabel("fusion gain kept, %")
    axes.legend()
