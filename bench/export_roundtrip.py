"""Exports loaded again by the tools they are for, and compared with our own numbers.

    python bench/export_roundtrip.py demo/cooperative --base bases/smollm2 --llama-server BINARY

Every model is exported with `molora export` in each form. PEFT, transformers and, where a binary
is named, llama-server load the files; their log-probabilities are compared with those of this
library in float32. Beside FILE.json a page FILE.md is written.

llama-server is not a package of this project. It was built from the source package
llama-cpp-python 0.3.36 (`vendor/llama.cpp`) with -DGGML_NATIVE=ON; without --llama-server its part
is skipped, in one line.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import torch  # noqa: E402
from llama_server import Server, serving  # noqa: E402
from molora_kalavai.uniform import UniformRouter  # noqa: E402
from peft import PeftModel  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from molora_fed.adapters.compatibility import applied  # noqa: E402
from molora_fed.adapters.files import load_adapter  # noqa: E402
from molora_fed.adapters.save import save_adapter  # noqa: E402
from molora_fed.export.merging import DTYPES, file_dtype  # noqa: E402
from molora_fed.export.subject import Subject, choose_weights, open_subject  # noqa: E402
from molora_fed.models.base import Base, load_base  # noqa: E402
from molora_fed.models.base_files import quiet_transformers  # noqa: E402
from molora_fed.models.layout import weight_of  # noqa: E402
from molora_fed.routing.bundle import save_fused  # noqa: E402
from molora_fed.routing.fused import FusedExpert, FusedModel  # noqa: E402
from molora_fed.storage.files import write_bytes, write_json  # noqa: E402
from molora_fed.testing.models import build_random_adapter  # noqa: E402

TEXTS = (
    "The parties agree that the court of the first instance shall",
    "def mean(values):\n    total = 0\n    for value in values:\n        total +=",
    "## Installation\n\nRun `pip install` in a new environment, then",
    "The temperature of the plasma was measured 12 times in 1998, and the",
)
SPLIT = (
    *TEXTS,
    "  leading spaces, a tab\t, CRLF\r\nand three\n\n\nlines",
    "naïve café, Straße, Ελληνικά, русский, 日本語, 한국어, 🦙🚀",
    "it's we'll they've I'd 3.14159 12345 1,000,000 x==y!=z (a[b]{c})",
)
TOP = 100
"""Tokens whose log-probabilities are compared at each prompt."""
RANDOM_RANKS = (4, 8)
MIXTURE = "the mixture of mixture.json"
INTRODUCTION = f"""
`molora export` wrote every form; the tool loaded it and gave log-probabilities, which are compared
with our own in float32, nats. Of PEFT and transformers: all tokens at all positions of {len(TEXTS)}
prompts. Of llama-server: its {TOP} likeliest tokens after each prompt. *Effect* is how far the
adapters move our own log-probabilities from the base's, in the mean; *mean* and *largest* are how
far the tool is from us; *beside a shift* is the largest without what all tokens of an answer share.

- **PEFT and the merged adapter** differ by the order of float32 sums.
- **A merged checkpoint** is as exact as the dtype of the base's files: in bfloat16 its distance is
  that of rounding, as the row with our weights rounded likewise shows. The merged adapter has
  none of it.
- **llama-server on the built-in base** (GPT-NeoX) reads GELU from a table of 16-bit numbers on a
  CPU. With the same table in our model the distance falls to that of float32 sums.
- **llama-server on SmolLM2** is apart by a constant for each answer: it adds up the probabilities
  of all 49,152 tokens one by one in 32 bits.
- **A GGUF base in bfloat16**, the default where the files are, makes llama.cpp round activations to
  bfloat16 too; with `--dtype float32` it does not.

A request without `lora` gets the scales of the command, which is why mixture.json starts the
server with `--lora-scaled`: with `--lora` it would get all adapters at scale 1.

`demo/cooperative` is of the demo at seed 42 ([demo](demo/README.md)); `specialists/` are trainings
of the study of a pretrained base ([real-base](kalavai/real-base.md)): without `--adapters` the
bench makes random ones.

llama-server is no package of this project. It was built from the source package
`llama-cpp-python` 0.3.36 outside of it, and named with `--llama-server`:

```
cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
  -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
cmake --build build --target llama-server
```

It ran with `--cache-type-k f32 --cache-type-v f32 --flash-attn off`, so that nothing but the above
is rounded."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders that `molora export` takes")
    parser.add_argument("--base", type=Path, help="a base to put specialists on, e.g. SmolLM2")
    parser.add_argument("--adapters", nargs="*", type=Path, default=[], help="random if none")
    parser.add_argument("--llama-server", type=Path, help="a binary; its part is skipped without")
    parser.add_argument("--out", type=Path, default=Path("docs/results/export.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    found: dict[str, Any] = {"top": TOP, "models": {}}
    with tempfile.TemporaryDirectory() as name:
        folders = {path.name: path for path in given.models}
        if given.base is not None:
            made = make_fused(given.base, given.adapters, Path(name) / "fused")
            folders[f"specialists of {given.base.name}"] = made
        with quiet_transformers():
            for title, folder in folders.items():
                work = Path(name) / "work" / title
                found["models"][title] = measure(folder, work, given.llama_server)
    found["versions"] = read_versions(given.llama_server)
    write_json(given.out, found)
    page = given.out.with_suffix(".md")
    write_bytes(page, render(found, shlex.join(["python", *sys.argv])).encode())
    print(f"{given.out}, {page}")


def make_fused(folder: Path, adapters: Sequence[Path], out: Path) -> Path:
    """A fused model of a base and adapters with uniform gates; random adapters if none is named."""
    base = load_base(folder)
    places = {path.name: path for path in adapters}
    for number, rank in enumerate(() if adapters else RANDOM_RANKS, 1):
        place = out.with_name(f"random-{number}")
        made = build_random_adapter(base.model, rank=rank, seed=number, strength=0.02)
        scaled = {n: replace(u, scale=16 / rank**0.5) for n, u in made.updates.items()}
        save_adapter(replace(made, updates=scaled), base.model, place)
        places[f"random-{number}"] = place
    experts = tuple(
        FusedExpert(name, load_adapter(place, model=base.model, name=name))
        for name, place in places.items()
    )
    fused = FusedModel(base, experts, UniformRouter(len(experts)), "uniform", "probability", 0)
    save_fused(fused, out, adapters=places)
    return out


def measure(folder: Path, work: Path, binary: Path | None) -> dict[str, Any]:
    """All exports of one model, each compared with our own numbers."""
    work.mkdir(parents=True)
    ours = Reference.of(open_subject(folder))
    subject, weights = ours.subject, ours.weights
    seconds = {}
    for name, more in {
        "peft": ["--to", "peft"],
        "adapter": ["--to", "merged"],
        "checkpoint": ["--to", "merged", "--as", "checkpoint"],
        "gguf": ["--to", "gguf", "--dtype", "float32"],
        "gguf-as-is": ["--to", "gguf"],
    }.items():
        if name == "gguf-as-is" and file_dtype(subject.base) == "float32":
            continue
        start = time.perf_counter()
        command = [sys.executable, "-m", "molora_cli.main", "export", str(folder)]
        command += ["--out", str(work / name), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.perf_counter() - start
    rows = [*compare_peft(ours, work), *compare_checkpoint(ours, work / "checkpoint")]
    result = {
        "base": subject.base.id,
        "dtype": file_dtype(subject.base),
        "specialists": {
            each.name: {"kind": each.adapter.kind, "rank": each.adapter.max_rank}
            for each in subject.specialists
        },
        "weights": dict(weights),
        "export_seconds": seconds,
        "rows": rows,
    }
    if binary is None:
        print("llama-server: skipped, no --llama-server was given.")
        return result
    rows += compare_llama(ours, work / "gguf", binary, result)
    if (work / "gguf-as-is").is_dir():
        rows += compare_file_dtype(ours, work / "gguf-as-is", binary)
    return result


@contextmanager
def mixed(subject: Subject, weights: Mapping[str, float]) -> Iterator[Any]:
    """The base with the weighted changes in its weights, in float32: our own numbers."""
    with ExitStack() as stack:
        for each in subject.specialists:
            if weights.get(each.name):
                updates = {
                    name: replace(update, scale=update.scale * weights[each.name])
                    for name, update in each.adapter.updates.items()
                }
                stack.enter_context(
                    applied(subject.base.model, replace(each.adapter, updates=updates))
                )
        yield subject.base.model


def read_logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities after each token of each prompt, (T, V) nats."""
    with torch.no_grad():
        return [
            torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
            for ids in prompts
        ]


@dataclass(frozen=True, eq=False)
class Reference:
    """Our own numbers of one model.

    Attributes:
        subject: The model.
        prompts: Token ids of each text.
        weights: The mixture that is exported by itself.
        base: Log-probabilities of the base alone.
    """

    subject: Subject
    prompts: Sequence[Sequence[int]]
    weights: Mapping[str, float]
    base: Sequence[Tensor]

    @staticmethod
    def of(subject: Subject) -> "Reference":
        """The numbers of a model."""
        prompts = [subject.base.tokenizer(text)["input_ids"] for text in TEXTS]
        base = read_logprobs(subject.base.model, prompts)
        return Reference(subject, prompts, choose_weights(subject, None).values, base)

    def at(self, weights: Mapping[str, float]) -> list[Tensor]:
        """Log-probabilities with the weighted changes, (T, V) nats of each prompt."""
        with mixed(self.subject, weights) as model:
            return read_logprobs(model, self.prompts)

    def compare(
        self, what: str, tool: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]
    ) -> dict[str, Any]:
        """How far log-probabilities are apart, and from the base's, all positions and tokens."""
        gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, self.base, strict=True)])
        return {
            "export": what,
            "tool": tool,
            "compared": gaps.numel(),
            "mean_effect_nats": float(moved.mean()),
            "largest_nats": float(gaps.max()),
            "mean_nats": float(gaps.mean()),
        }


def compare_peft(ours: Reference, work: Path) -> Iterator[Any]:
    base = str(ours.subject.base.folder)
    cases = {
        f"peft, {each.name}": (work / "peft" / each.name, {each.name: 1.0})
        for each in ours.subject.specialists
    }
    cases["merged adapter"] = (work / "adapter", ours.weights)
    for what, (folder, weights) in cases.items():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = read_logprobs(PeftModel.from_pretrained(plain, str(folder)).eval(), ours.prompts)
        yield ours.compare(what, "PEFT", ours.at(weights), theirs)


def compare_checkpoint(ours: Reference, folder: Path) -> Iterator[Any]:
    subject, weights = ours.subject, ours.weights
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    dtype = DTYPES[file_dtype(subject.base)]
    names = sorted({name for each in subject.specialists for name in each.adapter.updates})
    equal = total = 0
    for name in names:
        exact = weight_of(subject.base.model.get_submodule(name)).double()
        for each in subject.specialists:
            update = each.adapter.updates.get(name)
            if update is not None:
                product = update.b.double() @ update.a.double()
                exact = exact + weights[each.name] * update.scale * product
        written = weight_of(theirs.get_submodule(name))
        equal += int((exact.to(dtype).float() == written).sum())
        total += written.numel()
    found = read_logprobs(theirs, ours.prompts)
    row = ours.compare("merged checkpoint", "transformers", ours.at(weights), found)
    head, embedding = theirs.get_output_embeddings(), theirs.get_input_embeddings()
    row["dtype"] = json.loads((folder / "config.json").read_text())["dtype"]
    row["tied"] = head.weight is embedding.weight
    row["equal_numbers_fraction"] = equal / total
    yield row
    if dtype is not torch.float32:
        with mixed(subject, weights) as model, torch.no_grad():
            for name in names:
                weight = weight_of(model.get_submodule(name))
                weight.copy_(weight.to(dtype).float())
            rounded = read_logprobs(model, ours.prompts)
        what = f"merged checkpoint, our weights rounded to {file_dtype(subject.base)} too"
        yield ours.compare(what, "transformers", rounded, found)


def compare_llama(
    ours: Reference, folder: Path, binary: Path, result: dict[str, Any]
) -> Iterator[Any]:
    subject = ours.subject
    mixture = json.loads((folder / "mixture.json").read_text())
    names = [each.name for each in subject.specialists]
    cases: dict[str, Mapping[str, float]] = {"no adapter": {}}
    cases |= {f"{name} at {scale:g}": {name: scale} for name in names for scale in (1.0, 0.5)}
    cases["the first at 0.7, the last at -0.3"] = {names[0]: 0.7, names[-1]: -0.3}
    with serving(binary.resolve(), shlex.split(mixture["command"])[1:], folder) as server:
        result["loaded"] = server.list_adapters()
        split = [
            (server.tokenize(text), subject.base.tokenizer(text)["input_ids"]) for text in SPLIT
        ]
        result["texts_split_alike"] = f"{sum(a == b for a, b in split)} of {len(split)}"
        for what, values in cases.items():
            lora = [{"id": i, "scale": values.get(name, 0.0)} for i, name in enumerate(names)]
            yield ask(server, lora, ours, ours.at(values), f"gguf, {what}")[0]
        lora = mixture["request"]["lora"]
        own = ours.at(ours.weights)
        row, answer = ask(server, lora, ours, own, f"gguf, {MIXTURE}")
        yield row
        yield ask(server, None, ours, own, f"gguf, {MIXTURE} by a request without `lora`")[0]
        result["shown"] = show(subject.base, answer, own[0][-1], lora)
        if subject.base.model.config.model_type != "llama":
            with mixed(subject, ours.weights) as model, rounding_gelu(model):
                rounded = read_logprobs(model, ours.prompts)
            what = f"gguf, {MIXTURE}, our GELU rounded to 16 bits too"
            yield ask(server, lora, ours, rounded, what)[0]


def compare_file_dtype(ours: Reference, folder: Path, binary: Path) -> Iterator[Any]:
    """The mixture on a base in the dtype of its files, in which llama.cpp multiplies then."""
    mixture = json.loads((folder / "mixture.json").read_text())
    what = f"gguf in {file_dtype(ours.subject.base)}, {MIXTURE}"
    with serving(binary.resolve(), shlex.split(mixture["command"])[1:], folder) as server:
        yield ask(server, mixture["request"]["lora"], ours, ours.at(ours.weights), what)[0]


@contextmanager
def rounding_gelu(model: Any) -> Iterator[None]:
    """Our activations as llama.cpp computes them on a CPU: from a table of 16-bit numbers."""

    def look_up(_module: Any, args: tuple[Tensor], _output: Tensor) -> Tensor:
        values = args[0]
        rounded = torch.nn.functional.gelu(values.half().float(), approximate="tanh")
        table = rounded.half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, table))

    hooks = [
        module.register_forward_hook(look_up)
        for module in model.modules()
        if type(module).__name__.startswith("GELU")
    ]
    assert hooks, "no activation was found"
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ask(
    server: Server, lora: Sequence[Any] | None, ours: Reference, own: Sequence[Tensor], what: str
) -> tuple[dict[str, Any], dict[int, float]]:
    """The server's likeliest tokens after each prompt, against ours; and the first answer."""
    gaps: list[float] = []
    shifted: list[float] = []
    moved: list[float] = []
    alike = 0
    answers = [server.ask(ids, lora, TOP) for ids in ours.prompts]
    for answer, logprobs, base in zip(answers, own, ours.base, strict=True):
        apart = [value - float(logprobs[-1, token]) for token, value in answer.items()]
        gaps += [abs(gap) for gap in apart]
        shifted += [abs(gap - statistics.mean(apart)) for gap in apart]
        moved += [abs(float(logprobs[-1, token] - base[-1, token])) for token in answer]
        alike += max(answer, key=answer.__getitem__) == int(logprobs[-1].argmax())
    row = {
        "export": what,
        "tool": "llama-server",
        "compared": len(gaps),
        "mean_effect_nats": statistics.mean(moved),
        "largest_nats": max(gaps),
        "mean_nats": statistics.mean(gaps),
        "largest_beside_shift_nats": max(shifted),
        "likeliest_alike": f"{alike} of {len(answers)}",
    }
    return row, answers[0]


def show(base: Base, answer: Mapping[int, float], ours: Tensor, lora: Sequence[Any]) -> Any:
    """The first lines of one answer, for the page."""
    first = sorted(answer.items(), key=lambda item: -item[1])[:8]
    return {
        "prompt": TEXTS[0],
        "lora": list(lora),
        "tokens": [
            {
                "id": token,
                "text": base.tokenizer.decode([token]),
                "llama_server": value,
                "ours": float(ours[token]),
            }
            for token, value in first
        ],
    }


def read_versions(binary: Path | None) -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "peft", "gguf")}
    if binary is not None:
        ran = subprocess.run(
            [str(binary.resolve()), "--version"], capture_output=True, text=True, check=True
        )
        lines = (ran.stdout + ran.stderr).splitlines()
        found["llama-server"] = next(line for line in lines if line.startswith("version"))
    return found


def render(found: Mapping[str, Any], command: str) -> str:
    """The page."""
    lines = [
        "# Exports, loaded again by the tools they are for",
        "",
        f"`{command}`",
        "",
        "Versions: " + ", ".join(f"{name} {v}" for name, v in found["versions"].items()) + ".",
        *INTRODUCTION.splitlines(),
    ]
    for title, model in found["models"].items():
        members = ", ".join(
            f"{name} ({each['kind']}, rank {each['rank']})"
            for name, each in model["specialists"].items()
        )
        weights = ", ".join(f"{name} {value:.4f}" for name, value in model["weights"].items())
        lines += [
            "",
            f"## {title}",
            "",
            f"Base {model['base']}, files in {model['dtype']}; {members}. Mixture: {weights}.",
            "",
            "| export | tool | compared | effect | mean | largest | beside a shift |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [render_row(row) for row in model["rows"]]
        checkpoint = next(row for row in model["rows"] if "tied" in row)
        lines += [
            "",
            f"The merged checkpoint is in {checkpoint['dtype']}, head and embeddings "
            f"{'tied' if checkpoint['tied'] else 'apart'} as in the base; "
            f"{100 * checkpoint['equal_numbers_fraction']:.4f} % of the changed weights' numbers "
            "are those of the sum in float64, rounded once.",
        ]
        if "shown" in model:
            lines += render_answer(model)
    return "\n".join(lines) + "\n"


def render_row(row: Mapping[str, Any]) -> str:
    shift = row.get("largest_beside_shift_nats")
    return (
        f"| {row['export']} | {row['tool']} | {row['compared']:,} "
        f"| {row['mean_effect_nats']:.1e} | {row['mean_nats']:.1e} | {row['largest_nats']:.1e} "
        f"| {'' if shift is None else f'{shift:.1e}'} |"
    )


def render_answer(model: Mapping[str, Any]) -> list[str]:
    shown = model["shown"]
    lines = [
        "",
        f"llama-server splits {model['texts_split_alike']} texts into the base's tokens. What it "
        "answered to the prompt",
        f"`{shown['prompt']}` with `lora` as in mixture.json:",
        "",
        "| id | token | llama-server | ours |",
        "|---:|---|---:|---:|",
    ]
    lines += [
        f"| {one['id']} | `{json.dumps(one['text'])}` | {one['llama_server']:.6f} "
        f"| {one['ours']:.6f} |"
        for one in shown["tokens"]
    ]
    return lines


if __name__ == "__main__":
    main()
