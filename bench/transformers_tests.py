"""transformers' own model and generation tests on the fused model; writes what passed and why not.

`python bench/transformers_tests.py --sdist FILE --repository FILE --out FILE.md`, half a minute.
The tests are fetched, never kept: `--sdist` is the source distribution of the installed
transformers (pip downloads it if it is not given), `--repository` an archive of its repository at
the same tag, for the generation tests that the source distribution leaves out. Both may be folders.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "tests" / "transformers_suite" / "suite.py"
MARKERS = (
    "generate",
    "torch_compile_test",
    "torch_export_test",
    "flash_attn_test",
    "flash_attn_3_test",
)


def download(folder: Path) -> Path:
    """The source distribution of the installed version, by pip."""
    what = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, what], check=True)
    (found,) = folder.glob("transformers-*.tar.gz")
    return found


def unpack(source: Path, target: Path) -> None:
    """Add the tests of an archive or a folder to a folder; what is there stays."""
    with tempfile.TemporaryDirectory() as name:
        top = source
        if source.is_file():
            with tarfile.open(source) as archive:
                archive.extractall(name, filter="data")
            (top,) = Path(name).iterdir()
        for part in ("tests", "utils"):
            for path in (top / part).rglob("*"):
                goal = target / path.relative_to(top)
                if path.is_file() and not goal.exists():
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, goal)


def run(folder: Path) -> list[tuple[str, str, str]]:
    """Class, test and what became of it: "" passed, "failed: ...", or the reason it is skipped."""
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    markers = "".join(f"\n    {marker}: of transformers" for marker in MARKERS)
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n", encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    report = folder / "report.xml"
    options = ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "-q", "--tb=short"]
    options += ["--confcutdir", str(SUITE.parent), "-p", "no:cacheprovider", "-W", "ignore"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", str(SUITE)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        state = "" if skip is None else str(skip.get("message"))
        state = state if bad is None else f"failed: {bad.get('message')}"
        found.append((case.get("classname", "").lstrip("."), case.get("name", ""), state))
    return found


def write_page(found: list[tuple[str, str, str]], generation: str, out: Path) -> None:
    """The page: what ran, what passed, what is left out and why."""
    states = defaultdict(Counter)
    for case, _, state in found:
        word = "passed" if not state else "failed" if state.startswith("failed") else "skipped"
        states[case][word] += 1
    own = set(re.findall(r'^    "(test_\w+)": ', SUITE.read_text("utf-8"), re.MULTILINE))
    page = [
        "# transformers' own tests on the fused model",
        "",
        f"`{SUITE.relative_to(ROOT)}` runs the mixins `ModelTesterMixin` and `ConfigTester` of the "
        f"source distribution of transformers {transformers.__version__} and "
        f"`GenerationTesterMixin` {generation} on `FusedForCausalLM` with three experts of unequal "
        "ranks, one of them the base, and a router of evidence, on a Llama and on a GPT-2 "
        f"(Conv1D, tied head). torch {torch.__version__}. None of these files is kept here. "
        "Tests that compare hidden states compare log-probabilities, and a cache's keys and values "
        "are expected to have a row for every expert and text. Not run: `PipelineTesterMixin` (it "
        "reads models from the hub) and the mixins of training, tensor parallelism and FSDP (the "
        "model is for inference, on one device).",
        "",
        "`python bench/transformers_tests.py --sdist FILE --repository FILE --out "
        "docs/results/transformers_tests.md` (`make transformers-tests`)",
        "",
        "| base | passed | failed | skipped |",
        "|---|---|---|---|",
    ]
    for case, counts in sorted(states.items(), reverse=True):
        title = "GPT-2" if "GPT2" in case else "Llama"
        row = (counts[word] for word in ("passed", "failed", "skipped"))
        page.append(f"| {title} | {' | '.join(map(str, row))} |")
    page += ["", "## Left out by us", "", "| test | why |", "|---|---|"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for case, name, state in found:
        if case == "FusedTest" and state and not state.startswith("failed"):
            reasons[state].append(name)
    ours = {state: names for state, names in reasons.items() if set(names) & own}
    page += [f"| {', '.join(f'`{n}`' for n in names)} | {state} |" for state, names in ours.items()]
    page += ["", "## Skipped by transformers' own conditions (on the Llama)", ""]
    page += ["| why | tests |", "|---|---|"]
    merged: Counter[str] = Counter()
    for state, names in reasons.items():
        if state not in ours:
            merged[" ".join(state.replace("|", "/").split())[:160]] += len(names)
    page += [f"| {state} | {count} |" for state, count in merged.most_common()]
    failed = [(c, n, s) for c, n, s in found if s.startswith("failed")]
    page += ["", "## Failed", ""] if failed else []
    page += [f"- {case} `{name}`: {state[:200]}" for case, name, state in failed]
    out.write_text("\n".join(page) + "\n", encoding="utf-8")


def main() -> None:
    """Fetch, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = os.environ.get
    parser.add_argument("--sdist", type=Path, default=known("TRANSFORMERS_SDIST"))
    parser.add_argument("--repository", type=Path, default=known("TRANSFORMERS_REPOSITORY"))
    parser.add_argument("--at", default="at the same tag", help="which state the repository is in")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if find_spec("parameterized") is None:
        parser.error("expected the package 'parameterized', got none: pip install parameterized")
    if args.repository is None:
        parser.error(
            "expected --repository, got none: the source distribution has no generation tests. "
            f"Download the repository's archive of tag v{transformers.__version__}"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "suite"
        folder.mkdir()
        unpack(Path(args.sdist) if args.sdist else download(Path(name)), folder)
        has_generation = (folder / "tests" / "generation").exists()
        unpack(Path(args.repository), folder)
        found = run(folder)
    where = "of it" if has_generation else f"of its repository {args.at}"
    if args.out is not None:
        write_page(found, where, args.out)
    if not found or any(state.startswith("failed") for _, _, state in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
