"""Adapter folders of many tools: what becomes of each, and how far logits are from plain PEFT's.

Writes docs/results/adapter_folders.md from the cases that the tests use
(`tests/adapter_folders.py`): `python bench/adapter_folders.py [--out FILE]`, about two minutes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from adapter_folders import (  # noqa: E402
    CASES,
    TOLERANCE,
    Case,
    peft_logits,
    quiet,
    tiny_base,
)

from molora_fed.adapters.compatibility import applied  # noqa: E402
from molora_fed.adapters.convert import convert_adapter  # noqa: E402
from molora_fed.adapters.inspection import inspect_folder, report_on_base  # noqa: E402
from molora_fed.errors import AdapterError  # noqa: E402
from molora_fed.testing.models import build_tiny_tokenizer  # noqa: E402

OUT = REPOSITORY / "docs" / "results" / "adapter_folders.md"
TOKENS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(7))
FIRST = (
    "import pathlib, sys, time; start = time.perf_counter();"
    "from molora_fed.adapters.inspection import inspect_folder;"
    "inspect_folder(pathlib.Path(sys.argv[1])); print(time.perf_counter() - start)"
)


def measure(case: Case, folder: Path) -> tuple[str, float | None, float]:
    """Verdict, largest logit difference to plain PEFT of both forms, seconds of the first answer.

    Args:
        case: What to build.
        folder: Where; new.
    """
    with quiet():
        original = case.build(folder) or folder
    start = time.perf_counter()
    try:
        inspect_folder(folder)
        first = ""
    except AdapterError as error:
        first = str(error)
    seconds = time.perf_counter() - start
    base = tiny_base(case.architecture)
    try:
        _, adapter = report_on_base(folder, base, tokenizer=build_tiny_tokenizer())
    except AdapterError as error:
        return f"refused: {shorten(str(error))}", None, seconds
    expected = peft_logits(case.architecture, original, TOKENS)
    with applied(base, adapter), torch.no_grad():
        read = base(TOKENS).logits
    convert_adapter(folder, folder.with_name("normal"), model=base)
    written = peft_logits(case.architecture, folder.with_name("normal"), TOKENS)
    difference = max(float((each - expected).abs().max()) for each in (read, written))
    return "read" + (", with --base" if first else ""), difference, seconds


def shorten(message: str) -> str:
    """What was got and what repairs it."""
    text = message.partition(", got ")[2].replace("|", "\\|").replace("`", "")
    return text if len(text) <= 320 else f"{text[:319]}…"


def first_answer(folder: Path) -> float:
    """Seconds of the first answer in a process of its own, imports and all."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where the page goes")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    rows, differences, times = [], [], []
    with tempfile.TemporaryDirectory() as root:
        for number, case in enumerate(CASES):
            folder = Path(root) / str(number) / "a"
            folder.parent.mkdir()
            verdict, difference, seconds = measure(case, folder)
            assert verdict.startswith("refused") == bool(case.refused), (case.name, verdict)
            if difference is not None:
                differences.append(difference)
            times.append(seconds)
            shown = "" if difference is None else f"{difference:.1e}"
            rows.append(
                f"| {case.name} | {case.made_by} | {verdict} | {shown} | {1000 * seconds:.0f} |"
            )
            print(rows[-1], flush=True)
        process = first_answer(Path(root) / "0" / "a")
    read = len(differences)
    page = [
        "# Adapter folders",
        "",
        f"`python bench/adapter_folders.py`: {len(rows)} folders for tiny random bases, made by "
        f"PEFT {peft.__version__} itself or by hand like what other tools write, with transformers "
        f"{transformers.__version__} and torch {torch.__version__}. {read} are read without loss, "
        f"{len(rows) - read} are refused with a cause and a repair.",
        "",
        "The difference is the largest of all logits (float32, on 48 tokens) between plain PEFT "
        "on the original folder and, first, the base with our reading of it; second, plain PEFT "
        f"on what `molora adapter convert` wrote. The largest of all is {max(differences):.1e}; "
        f"the tests allow {TOLERANCE:g}. Where PEFT cannot load a folder, as with keys that "
        "something was put around, the original is the same adapter before that.",
        "",
        "The last column is the first answer, without a base, in milliseconds: the largest is "
        f"{1000 * max(times):.0f}. In a process of its own, with all imports, it takes "
        f"{process:.2f} s.",
        "",
        "| folder | made by | verdict | largest logit difference | first answer, ms |",
        "|---|---|---|---:|---:|",
        *rows,
    ]
    out.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
