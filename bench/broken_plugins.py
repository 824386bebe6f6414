"""What broken plugins do to a cooperative: each is used once, and the user's message is noted.

`python bench/broken_plugins.py --cooperative FOLDER [--out docs/results/broken_plugins.md]`

The cooperative, e.g. that of `molora demo`, is copied and stays as it is. The table of broken
plugins is that of the tests (tests/broken_plugins.py). First and last the copy is fused without
any of them; the figures of both must be equal.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from broken_plugins import CASES, Workshop, tell  # noqa: E402

from molora_fed.cooperative.cooperative import open_cooperative  # noqa: E402

FIGURES = ("gain_percent", "losses", "gates", "guard", "router")
PAGE = """# Broken plugins

{count} broken plugins over all hooks, each used once on a cooperative of {contributions}
contributions ({steps}).
"before" is what happened at commit 87873ee, "now" what the user is told today;
`harmless` means that nothing has to be said, because nothing else is touched. A compared router, a
merge or a predictor is a row of the report, and the run goes on; a published router, and whatever
else a run cannot do without, ends it in this one line.

```
python bench/broken_plugins.py --cooperative FOLDER --out docs/results/broken_plugins.md
```

{verdict}

| used as | defect | at 87873ee | now |
|---|---|---|---|
{rows}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through the table and write the page.

    Returns:
        0 if every case is as the table says and the last fusion is like the first.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cooperative", type=Path, required=True, help="A cooperative's folder.")
    parser.add_argument("--out", type=Path, help="Markdown page to write.")
    chosen = parser.parse_args(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="molora-broken-") as name:
        folder = Path(name) / "cooperative"
        shutil.copytree(chosen.cooperative, folder)
        workshop = Workshop(open_cooperative(folder), folder)
        first, wrong, rows = workshop.fuse(), [], []
        for case in track(CASES, "broken plugins", console=console):
            start = time.monotonic()
            said = tell(workshop, case)
            if case.now not in said:
                wrong.append(f"{case.use} {case.name}: {said}")
            cells = (case.use, case.defect, case.before, said.replace(name, "FOLDER"))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            console.print(f"{case.use} {case.name}: {time.monotonic() - start:.1f} s", style="dim")
        last = workshop.fuse()
    is_same = all(first[key] == last[key] for key in FIGURES)
    page = PAGE.format(
        count=len(CASES),
        contributions=len(workshop.contributions),
        steps=_describe_steps(workshop),
        verdict=_describe(first, last, is_same),
        rows="\n".join(rows),
    )
    if chosen.out is not None:
        chosen.out.write_text(page, encoding="utf-8")
    console.print(_describe(first, last, is_same), *wrong, sep="\n", markup=False)
    return 0 if is_same and not wrong else 1


def _describe_steps(workshop: Workshop) -> str:
    steps = workshop.cooperative.charter.amendment.training.steps
    of_base = (workshop.base.training or {}).get("steps", "unknown")
    return f"steps of the base: {of_base}, of a specialist: {steps} at most"


def _describe(first: dict[str, Any], last: dict[str, Any], is_same: bool) -> str:
    gains = [r["gain_percent"][r["router"]]["vs_best_alone"] for r in (first, last)]
    return (
        f"Before: router {first['router']}, {gains[0]:+.2f} % over the best anyone has alone. "
        f"Afterwards, without any broken plugin: router {last['router']}, {gains[1]:+.2f} %; all "
        f"losses, gates and gains {'equal, digit by digit' if is_same else 'DIFFER'}."
    )


if __name__ == "__main__":
    sys.exit(main())
