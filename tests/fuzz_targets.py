"""Entry points of all that comes from outside, as functions of bytes, with good inputs.

A target's `run` may raise errors of this package, which users see as one line, and nothing else.
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from fuzz_adapters import FOREIGN_WORDS, prepare_foreign
from fuzz_folders import Run, encode_input, run_in_folder
from fuzz_mail import FROM_CONTRIBUTOR, FROM_SERVER, prepare_invitations, prepare_mail
from fuzz_models import (
    ADAPTER_WORDS,
    BASE_WORDS,
    prepare_adapter,
    prepare_adapters,
    prepare_base,
    prepare_bases,
    prepare_carried,
    prepare_sample_folders,
    prepare_samples,
)
from fuzz_mutators import (
    Mutate,
    change_bytes,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
    mutate_toml,
)
from fuzz_texts import (
    TEXT_WORDS,
    prepare_corpus,
    prepare_parquet,
    prepare_tables,
    prepare_text_folders,
)
from fuzz_traces import TRACE_WORDS, prepare_runs, prepare_traces

from molora_fed.adapters.files import CONFIG_FILE, META_FILE, WEIGHTS_FILE
from molora_fed.charter import parse_charter
from molora_fed.contributions.manifest import MANIFEST_FILE, parse_manifest
from molora_fed.reporting.report import REPORT_JSON, load_report, read_metrics, write_report
from molora_fed.types import ADAPTER_FILES, Split

__all__ = ["TARGETS", "Target"]

KEPT = Path(__file__).parent / "data"
_HASH = "a" * 64


@dataclass(frozen=True)
class Target:
    """One parser of one entry point.

    Attributes:
        name: Unique name.
        door: The entry point it belongs to.
        mutate: Changes an input inside its structure.
        prepare: From an empty folder, good inputs and the function to call with others.
        inputs: Changed inputs that the tests try; as many as take about a second.
        fuzzed: Changed inputs that bench/fuzz.py tries.
        fresh: Share of them that are changed from a good one, and not from one that reached new
            code; less where what is good takes long.
    """

    name: str
    door: str
    mutate: Mutate
    prepare: Callable[[Path], tuple[Sequence[bytes], Run]]
    inputs: int = 200
    fuzzed: int = 50_000
    fresh: float = 0.5


def _prepare_manifests(folder: Path) -> tuple[Sequence[bytes], Run]:
    contribution = KEPT / "kept" / "contributions"
    seeds = [path.read_bytes() for path in sorted(contribution.rglob(MANIFEST_FILE))]
    return seeds, lambda data: parse_manifest(data) and None


def _prepare_charters(folder: Path) -> tuple[Sequence[bytes], Run]:
    seeds = [path.read_bytes() for path in sorted(KEPT.rglob("cooperative.toml"))]
    whole = tomllib.loads(seeds[0].decode())  # of version 2
    whole["identity"]["version"] = 2
    whole["identity"]["base"] |= {"config": _HASH, "files": {"config.json": _HASH}}
    seeds.append(tomli_w.dumps(whole).encode())
    return seeds, lambda data: parse_charter(data.decode("utf-8", "replace")) and None


def _describe_report() -> dict[str, Any]:
    return {REPORT_JSON: {"json": json.loads((KEPT / "report.json").read_bytes()), "size": 0}}


def _prepare_reports(folder: Path) -> tuple[Sequence[bytes], Run]:
    run = run_in_folder(folder, lambda place, value: load_report(place / REPORT_JSON))
    return [encode_input(_describe_report())], run


def _prepare_pages(folder: Path) -> tuple[Sequence[bytes], Run]:
    """A report with its training metrics, read and written again with its page."""

    def write(place: Path, value: dict[str, Any]) -> None:
        write_report(load_report(place / REPORT_JSON), read_metrics(place), folder / "report")

    rows = [{"step": step, "validation_loss": 2.5 / step} for step in (1, 2)]
    files = {**_describe_report(), "metrics/alice.jsonl": {"lines": rows}}
    return [encode_input(files)], run_in_folder(folder, write)


PARSERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "mail": {
        "molora_fed.federation.wire": ("unpack_envelope",),
        "molora_fed.federation.envelopes": ("parse_",),
        "molora_fed.federation.messages": ("parse_",),
    },
    "invitations": {"molora_fed.federation.invitations": ("parse_invitation",)},
    "manifests": {
        "molora_fed.contributions.manifest": (
            "parse_manifest",
            "_validate",
            "_check_",
            "Manifest.",
            "FileEntry.",
            "SampleEntry.",
        ),
    },
    "adapters": {
        "molora_fed.adapters.files": ("load_",),
        "molora_fed.adapters.headers": ("_file_size", "load_", "check_", "read_", "opened"),
        "molora_fed.adapters.low_rank_files": ("load_", "read_"),
        "molora_fed.adapters.peft_config": ("",),
        "molora_fed.adapters.peft_keys": ("",),
        "molora_fed.adapters.peft_tensors": ("",),
        "molora_fed.adapters.peft_folder": ("",),
        "molora_fed.adapters.kept_weights": ("",),
        "molora_fed.adapters.inspection": ("",),
        "molora_fed.adapters.convert": ("",),
        "molora_fed.adapters.delta_files": ("load_", "_check_"),
        "molora_fed.adapters.quantised_files": (
            "load_",
            "_load_",
            "_check_",
            "_read",
            "_parts",
            "_expect_",
            "_Module",
            "is_quantised",
        ),
    },
    "carried files": {
        "molora_fed.adapters.carried_files": (
            "load_carried",
            "find_carried_fault",
            "_find_",
            "_name_",
        ),
    },
    "samples": {"molora_fed.corpus.blocks": ("load_blocks", "Blocks.__post_init__")},
    "charters": {
        "molora_fed.charter": ("parse_charter", "Identity._", "read_amendment", "_name_unnamed"),
        "molora_fed.storage.toml": ("",),
    },
    "base folders": {
        "molora_fed.models.base": ("load_", "_load", "_read_"),
        "molora_fed.models.base_config": ("",),
        "molora_fed.models.base_files": (
            "load_json_file",
            "find_",
            "count_tensors",
            "_find_tensors",
            "stage_checkpoint",
        ),
    },
    "corpora": {
        "molora_fed.corpus.documents": (
            "read_documents",
            "_Found",
            "_read_",
            "_list_",
            "_find_inside",
            "_find_files",
            "_describe_",
            "_show",
            "_check_read",
        ),
        "molora_fed.corpus.inventory": ("",),
        "molora_fed.corpus.raw_text": ("",),
        "molora_fed.corpus.readers": ("",),
        "molora_fed.corpus.records": (
            "RecordReader",
            "check_text",
            "parse_record",
            "_parse_",
            "choose_columns",
            "_describe_",
            "_join",
        ),
        "molora_fed.corpus.html_text": ("",),
        "molora_fed.corpus.chats": ("",),
        # All but data sets of the Hub: the library `datasets` reads what comes over the network.
        "molora_fed.corpus.parquet": (
            "read_",
            "_read",
            "write_",
            "_write",
            "_describe_",
            "_list_rows",
            "_list_parquet",
            "_list_batch",
            "_list_arrow",
            "_find_kind",
            "_count_",
        ),
    },
    "traces": {
        "molora_fed.tracing.verifying": ("verify", "_read_", "_is_kind", "_check_root", "_list_"),
        "molora_fed.tracing.run_scan": ("",),
    },
    "reports": {
        "molora_fed.reporting.report": ("load_report", "write_report", "_check_result", "render"),
    },
}
"""By door, the functions that look at what comes through it: modules, and prefixes of names."""

TARGETS: tuple[Target, ...] = (
    *(
        Target(
            f"mail-{sender}", "mail", mutate_json, prepare_mail(sender, letters), fuzzed=100_000
        )
        for sender, letters in (("server", FROM_SERVER), ("contributor", FROM_CONTRIBUTOR))
    ),
    Target("invitation", "invitations", mutate_json, prepare_invitations, fuzzed=100_000),
    Target(
        "manifest", "manifests",
        partial(mutate_json, words=(*(str(split) for split in Split), "base", *ADAPTER_FILES)),
        _prepare_manifests,
    ),
    *(
        Target(
            f"adapter-{kind}-{precision}-{name}", "adapters", mutate,
            prepare_adapter(kind, precision, file),
        )
        for kind, precision in (("lora", "float32"), ("delta", "float32"), ("svd", "int4"))
        for name, file, mutate in (
            ("weights", WEIGHTS_FILE, mutate_safetensors),
            ("config", CONFIG_FILE, mutate_json),
            ("meta", META_FILE, mutate_json),
        )
    ),
    Target(
        "adapter-folder", "adapters", partial(mutate_json, words=ADAPTER_WORDS),
        prepare_adapters, fuzzed=20_000,
    ),
    Target(
        "adapter-foreign", "adapters", partial(mutate_json, words=FOREIGN_WORDS),
        prepare_foreign, inputs=20, fuzzed=20_000,
    ),
    Target("carried", "carried files", mutate_safetensors, prepare_carried),
    Target("samples", "samples", mutate_safetensors, prepare_samples),
    Target(
        "samples-folder", "samples",
        partial(mutate_json, words=("tokens", "documents", "clusters", "I32", "__metadata__")),
        prepare_sample_folders, fuzzed=20_000,
    ),
    Target("charter", "charters", mutate_toml, _prepare_charters),
    Target(
        "base-config", "base folders", mutate_json, prepare_base("config.json"), inputs=12,
        fuzzed=15_000, fresh=0.1,
    ),
    Target(
        "base-folder", "base folders", partial(mutate_json, words=BASE_WORDS), prepare_bases,
        inputs=12, fuzzed=5_000, fresh=0.3,
    ),
    *(
        Target(
            f"corpus-{suffix[1:].replace('.', '-')}", "corpora", mutate, prepare_corpus(suffix),
            inputs=inputs, fuzzed=fuzzed,
        )
        for suffix, mutate, inputs, fuzzed in (
            (".txt", change_bytes, 50, 20_000),  # encodings are guessed
            (".jsonl", mutate_lines, 200, 100_000),
            (".json", mutate_json, 200, 50_000),
            (".csv", change_bytes, 200, 50_000),
            (".tsv", change_bytes, 200, 50_000),
            (".html", change_bytes, 200, 50_000),
            (".txt.gz", change_bytes, 200, 50_000),
        )
    ),
    Target(
        "corpus-parquet", "corpora", change_bytes, prepare_parquet, inputs=30, fuzzed=20_000
    ),
    Target(
        "corpus-table", "corpora",
        partial(mutate_json, words=(
            "text", "times", "compression", "use_dictionary", "snappy", "form", "stream", "file",
            "text_field", "loss_on", "assistant", "messages", "a.b", "content", "prompt", "output",
        )),
        prepare_tables, inputs=30, fuzzed=2_000,
    ),
    Target(
        "corpus-folder", "corpora", partial(mutate_json, words=TEXT_WORDS), prepare_text_folders,
        inputs=100, fuzzed=20_000,
    ),
    Target("trace", "traces", mutate_lines, prepare_traces),
    Target(
        "trace-folder", "traces", partial(mutate_json, words=TRACE_WORDS), prepare_runs,
        inputs=50, fuzzed=10_000,
    ),
    Target("report", "reports", mutate_json, _prepare_reports),
    Target(
        "report-page", "reports", mutate_json, _prepare_pages, inputs=4, fuzzed=1_000, fresh=0.1
    ),
)  # fmt: skip
