"""Every verdict of the studies before and after a change, from the kept results of both.

    python bench/claims.py --before COMMIT --out docs/results/claims.md

Reads the JSON files under docs/results as they are now and as they were at a commit (with `git
show`), pairs the claims of each study by their sentences, and writes one table a study. What stands
in the page above the line that begins the generated part is written by hand, and stays.
"""

import argparse
import difflib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from molora_studies.framework.render import render_table

from molora_fed.storage.files import write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
START = "<!-- Below: written by bench/claims.py -->"
NEAR = 0.5
"""Sentences this alike are one claim that is worded anew."""

Claim = Mapping[str, Any]
Pair = tuple[Claim | None, Claim | None]


def read_results(tree: Path) -> dict[str, dict[str, Any]]:
    """Results of studies by file, in the files as they are."""
    found = {}
    for path in sorted((tree / RESULTS).rglob("*.json")):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and {"study", "summary"} <= content.keys():
            found[path.relative_to(tree).as_posix()] = content
    return found


def read_claims_at(commit: str, file: str) -> list[Claim]:
    """Claims of a file at a commit; none if it was not there."""
    shown = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{commit}:{file}"], capture_output=True, check=False
    )
    return json.loads(shown.stdout)["summary"]["claims"] if shown.returncode == 0 else []


def pair_claims(before: Sequence[Claim], after: Sequence[Claim]) -> list[Pair]:
    """Claims with the same sentence, then those with the nearest one, then what is new or gone."""
    old = {claim["claim"]: claim for claim in before}
    pairs: list[Pair] = [(old.pop(claim["claim"], None), claim) for claim in after]
    for place, (known, claim) in enumerate(pairs):
        if known is None and claim is not None:
            near = difflib.get_close_matches(claim["claim"], list(old), 1, NEAR)
            if near:
                pairs[place] = (old.pop(near[0]), claim)
    return pairs + [(claim, None) for claim in old.values()]


def describe_pair(pair: Pair) -> list[str]:
    """A row: claim, verdict before and after, unit, and why where it changed."""
    before, after = pair
    claim = after or before or {}
    verdicts = [("-" if one is None else one["verdict"]) for one in pair]
    changed = verdicts[0] != verdicts[1]
    was = before["claim"] if before is not None else claim["claim"]
    return [
        claim["claim"] if was == claim["claim"] else f'{claim["claim"]} (before: "{was}")',
        verdicts[0],
        f"**{verdicts[1]}**" if changed else verdicts[1],
        claim.get("unit", "-"),
        f"{claim['measured']}: {claim['reason']}" if changed else "",
    ]


def count_verdicts(claims: Sequence[Claim | None]) -> str:
    """Verdicts by number, as text."""
    found = Counter(claim["verdict"] for claim in claims if claim is not None)
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(found.items()))


def write_tables(commit: str, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the generated part."""
    pairs = {
        file: pair_claims(read_claims_at(commit, file), document["summary"]["claims"])
        for file, document in results.items()
    }
    every = [pair for found in pairs.values() for pair in found]
    changed = sum(before is None or after is None or before["verdict"] != after["verdict"]
                  for before, after in every)  # fmt: skip
    yield "## Verdicts of the studies"
    yield ""
    yield f"Before (commit `{commit[:7]}`): {count_verdicts([before for before, _ in every])}."
    yield ""
    yield f"After: {count_verdicts([after for _, after in every])}. {changed} changed, in bold."
    for file, found in pairs.items():
        page = Path(file).relative_to(RESULTS).with_suffix(".md").as_posix()
        yield ""
        yield f"### [{results[file]['study']}]({page})"
        yield ""
        columns = ("claim", "before", "after", "over", "why, where it changed")
        yield from render_table(columns, [describe_pair(pair) for pair in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="commit to compare with")
    parser.add_argument("--out", type=Path, required=True, help="docs/results/claims.md")
    arguments = parser.parse_args()
    known = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{arguments.before}^{{commit}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if known.returncode != 0:
        sys.exit(f"Cannot compare with '{arguments.before}': expected a commit of this repository.")
    page = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else ""
    hand = page.partition(START)[0].rstrip() or "# What changed in our claims"
    lines = write_tables(known.stdout.strip(), read_results(ROOT))
    text = "\n".join([hand, "", START, "", *lines]) + "\n"
    write_bytes(arguments.out, text.encode())
    print(f"page  {arguments.out}")


if __name__ == "__main__":
    main()
