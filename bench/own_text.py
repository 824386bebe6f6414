"""Contributors on their own text: manual pages in two languages, one folder each, through the demo.

    python bench/own_text.py            # writes the folders, runs the demo, writes the page
    python bench/own_text.py --from RUN # writes the page of a run made before

The pages are all of this machine's in German and French, reduced to plain text, one `.txt` file a
page.
"""

import argparse
import os
import subprocess
from pathlib import Path

from molora_fed.corpus.manuals import read_manual_pages
from molora_fed.storage.files import write_bytes
from molora_fed.types import Document

LANGUAGES = {"german": "de", "french": "fr"}
OUT = Path("docs/results/own_text.md")
COLUMNS = "118"
_EARLIER = "## Before held-out text was compared with other contributors'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="folder of a run made before")
    run = parser.parse_args().source or Path("own-text")
    folders = {domain: run / domain for domain in LANGUAGES}
    printed = run / "printed.txt"
    if not printed.is_file():
        for domain, folder in folders.items():
            write_folder(domain, folder)
        data = [
            part for domain, folder in folders.items() for part in ("--data", f"{domain}={folder}")
        ]
        # Two contributors are too few for masked sums.
        command = ["molora", "demo", "--privacy", "pooled", *data, "--out", str(run / "demo")]
        environment = {**os.environ, "COLUMNS": COLUMNS}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        write_bytes(printed, done.stdout.encode())
    OUT.write_text(describe(folders, printed.read_text(encoding="utf-8")), encoding="utf-8")


def read_pages(domain: str) -> list[Document]:
    """All manual pages of a language."""
    return list(read_manual_pages(LANGUAGES[domain]))


def write_folder(domain: str, folder: Path) -> None:
    for page in read_pages(domain):
        write_bytes(folder / f"{page.name.replace('/', '-')}.txt", page.text.encode())


def cut_summary(printed: str) -> str:
    """What a run prints at its end, without progress and without paths of this machine."""
    lines = [line.rstrip() for line in printed.splitlines()]
    first = next(n for n, line in enumerate(lines) if " gain over the best anyone" in line)
    last = next((n for n in range(first, len(lines)) if lines[n].startswith("report  ")), None)
    return "\n".join(lines[first:last]).rstrip()


def describe(folders: dict[str, Path], printed: str) -> str:
    counts = {domain: len(list(folder.glob("*.txt"))) for domain, folder in folders.items()}
    files = " and ".join(f"{count} {domain}" for domain, count in counts.items())
    earlier = OUT.read_text(encoding="utf-8")
    kept = earlier[earlier.index(_EARLIER) :] if _EARLIER in earlier else ""
    return f"""# Contributors on their own text

Two folders of plain text that are no built-in domain: manual pages ({files}
files), and the built-in base, trained on the four built-in domains and so on neither language.
`python bench/own_text.py` makes the folders of this machine's pages, runs the demo on them and
writes this page.

```
molora demo --privacy pooled --data german=german --data french=french
```

What it printed:

```
{cut_summary(printed)}
```

{kept}"""


if __name__ == "__main__":
    main()
