"""What `adapter-regime` says: bytes, gain kept, and whether LoRA can fuse."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora_studies.framework.contract import Claim, Figure, Summary, Table, Verdict
from molora_studies.kalavai.conditions import estimate

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
            *_claim_lora(fusions, recipes),
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
    """One claim a size: the smallest adapter that keeps enough, at its interval's lower end."""
    claims = []
    for size in dict.fromkeys(labels["size"] for labels, _ in fusions):
        own = [(labels, _describe_fusion(r)) for labels, r in fusions if labels["size"] == size]
        enough = [row for row in own if row[1]["kept_percent"]["low"] >= kept_percent]
        enough = [row for row in enough if row[1]["seeds"] == max(r["seeds"] for _, r in own)]
        claim = (
            f"{size}: an adapter of at most {bytes_percent:g} % of the full difference's bytes "
            f"keeps {kept_percent:g} % of full fine-tuning's fusion gain"
        )
        if not enough:
            most = max(own, key=lambda row: row[1]["kept_percent"]["point"])
            measured = f"most kept: {_show_kept(*most)}"
            claims.append(
                Claim(claim, "no figure (our aim)", measured, "does not hold",
                      "no adapter's interval lies above the share asked for")
            )  # fmt: skip
            continue
        smallest = min(enough, key=lambda row: row[1]["bytes_percent"])
        verdict: Verdict = "holds" if smallest[1]["bytes_percent"] <= bytes_percent else "differs"
        claims.append(
            Claim(claim, "no figure (our aim)", _show_kept(*smallest), verdict,
                  "the smallest adapter whose 95 % interval by document cluster lies above the "
                  "share asked for")
        )  # fmt: skip
    return claims


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
        is_certain = share.low is not None and share.low >= kept_percent
        claims.append(
            Claim(
                f"{size}: the same share of the published gain, each fusion on the best of its "
                "own specialists",
                "no figure (our aim)",
                f"{variant}: {share.show(sign=False, digits=1)} with {size_percent:.1f} % of the "
                "bytes",
                "holds" if is_certain else "not decided" if enough else "does not hold",
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


def _claim_lora(fusions: Sequence[Row], recipes: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Whether specialists of LoRA improve on the base, and their fusion on the best alone.

    Recipes that were only screened carry no claim.
    """
    claims = []
    confirmed = max((result["seeds"] for _, result in fusions), default=0)
    for labels, result in fusions:
        if not labels["variant"].startswith("lora") or result["seeds"] < confirmed:
            continue
        matching = [
            r for r in recipes if (r["size"], r["recipe"]) == (labels["size"], labels["variant"])
        ]
        divergence = matching[0]["divergence_percent"]
        own = estimate(gains["best_alone"] for gains in result["gains"]["small"])
        lowest = own.mean if own.low is None else own.low
        fuses = divergence > 0 and lowest > 0
        claims.append(
            Claim(
                f"{labels['size']}, {labels['variant']}: LoRA specialists do not improve on the "
                "base and so cannot be fused",
                _PUBLISHED_LORA,
                f"divergence {divergence:+.2f} %, gain on its best alone {own.show()}",
                "does not hold" if fuses else "not decided" if divergence > 0 else "holds",
                "stopped by validation; the published recipe ran a fixed number of steps over "
                "little text",
            )
        )
    return claims


def _show_kept(labels: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    kept, seeds = result["kept_percent"], result["seeds"]
    return (
        f"{labels['variant']}: {kept['point']:.1f} % [{kept['low']:.1f}, {kept['high']:.1f}] of "
        f"the gain with {result['bytes_percent']:.1f} % of the bytes, {seeds} "
        f"seed{'s' if seeds > 1 else ''}"
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
