"""Entry points of all that comes from outside, as functions of bytes, with good inputs.

A target's `run` may raise errors of this package, which users see as one line, and nothing else.
"""

import base64
import contextlib
import faulthandler
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from fuzz_mutators import (
    Mutate,
    change_bytes,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
    mutate_toml,
)

from molora_fed.adapters.contract import LinearOptions
from molora_fed.adapters.files import CONFIG_FILE, META_FILE, WEIGHTS_FILE, load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.charter import AdapterRules, parse_charter
from molora_fed.contributions.manifest import MANIFEST_FILE, parse_manifest
from molora_fed.corpus.blocks import Blocks, load_blocks
from molora_fed.corpus.documents import read_documents
from molora_fed.corpus.parquet import UnreadableError, read_texts, write_texts
from molora_fed.errors import ConfigError
from molora_fed.federation.envelopes import Sender
from molora_fed.federation.invitations import Invitation, parse_invitation
from molora_fed.federation.wire import unpack_envelope
from molora_fed.models.base import load_base
from molora_fed.reporting.report import load_report, write_report
from molora_fed.storage.files import hash_bytes
from molora_fed.storage.keys import build_public_pem
from molora_fed.testing import build_random_adapter
from molora_fed.testing.models import build_tiny_checkpoint, build_tiny_model
from molora_fed.tracing.reading import read_records
from molora_fed.tracing.verifying import export_run, verify
from molora_fed.tracing.writing import TraceWriter
from molora_fed.types import Split

__all__ = ["TARGETS", "Target"]

KEPT = Path(__file__).parent / "data"
_KEY = ec.derive_private_key(20_261_122, ec.SECP384R1())
_HASH = "a" * 64
_FILES = [{"name": "a/b.bin", "sha256": _HASH, "num_bytes": 3}]
_SIGNED = {"public_key": "PEM", "signature": "ab" * 50}
_FROM_CONTRIBUTOR: dict[str, dict[str, object]] = {
    "hello": {"purpose": "molora-hello-2", "name": "alice", "domain": "legal", **_SIGNED},
    "state": {
        "phase": "TRAINING", "step": 3, "total": 9, "loss": 2.5, "eta_seconds": 1.0,
        "message": "text", "problem": "", "charter": _HASH, "tasks": ["train-0"], "question": "",
        "acknowledged": "", "refused": False, "result": "", "received": [_HASH],
        "held": [f"{_HASH}-0-3"],
    },
    "manifest": {"files": _FILES},
    "answer": {"question": _HASH, "files": _FILES, "signature": "ab"},
}  # fmt: skip
_FROM_SERVER: dict[str, dict[str, object]] = {
    "hello": {"nonce": _HASH, "identity": _HASH, "coordinator": _HASH},
    "refusal": {"reason": "text"},
    "charter": {
        "id": _HASH, "text": "", "identity": _HASH, "amendment": 0, "base": _FILES,
        "tasks": [{"id": "train-0", "kind": "train"}], "part_bytes": 9, **_SIGNED,
    },
    "task": {"id": "train-0", "kind": "train"},
    "wait": {"seconds": 1.0, "parts_bytes": 9, "question": _HASH},
    "fetch": {"names": [f"{_HASH}-0-3"]},
    "acknowledgement": {
        "shipment": _HASH, "contribution_id": "", "state": "ADMITTED", "findings": ["text"],
        "signature": "ab",
    },
    "result": {
        "id": _HASH, "files": _FILES, "part_bytes": 9, "identity": _HASH, "signature": "ab",
        "summary": {"amendment": 0, "contributions": ["a"], "gain_percent": {"r": {"x": 1.0}}},
    },
    "question": {
        "id": _HASH, "files": _FILES, "part_bytes": 9, "answer_bytes": 9, "amendment": 0,
        "signature": "ab",
    },
}  # fmt: skip

Run = Callable[[bytes], None]


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
    """

    name: str
    door: str
    mutate: Mutate
    prepare: Callable[[Path], tuple[Sequence[bytes], Run]]
    inputs: int = 200
    fuzzed: int = 50_000


def _replacing(path: Path, call: Callable[[], object]) -> Run:
    """Calls a function after a file has been given the input's bytes."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        call()

    return run


def _build_content(data: bytes) -> RecordDict:
    """A message's content: of its version, letters and parts, or of bytes instead of letters."""
    text, version, parts = data.decode("utf-8", "surrogateescape"), 1, []
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(text)
        if isinstance(whole, dict) and "letters" in whole:
            letters, version, parts = (whole.get(k) for k in ("letters", "version", "parts"))
            is_number = isinstance(letters, int) and abs(letters) < 2**31
            text = letters if is_number else json.dumps(letters)
    version = version if isinstance(version, int | float | str) else 1
    content = RecordDict({"letters": ConfigRecord({"version": version, "json": text})})
    arrays = {}
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, list) and part:
            size = part[-1] if isinstance(part[-1], int) and 0 <= part[-1] <= 2**20 else 0
            arrays["-".join(str(each)[:400] for each in part)] = bytes(size)
    if arrays:
        content["parts"] = ArrayRecord(
            {
                name: Array(dtype="bytes", shape=(len(each),), stype="molora.part", data=each)
                for name, each in arrays.items()
            }
        )
    return content


def _prepare_mail(sender: Sender, letters: Mapping[str, dict[str, object]]):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        def run(data: bytes) -> None:
            unpack_envelope(_build_content(data), sender=sender)

        every = [{"kind": kind, "body": body} for kind, body in letters.items()]
        parts = [[_HASH, 0, 3], [_HASH, 3, 100]]
        some = [{"version": 1, "letters": every, "parts": parts}, *([one] for one in every)]
        return [json.dumps(each).encode() for each in some], run

    return prepare


def _prepare_invitations(folder: Path) -> tuple[Sequence[bytes], Run]:
    invitation = Invitation(
        server="fed.example:8080", authority=_HASH, charter=_HASH, coordinator=_HASH,
        secret="s3cret-s3cret", name="alice", domain="legal", expires=1_800_000_000,
    )  # fmt: skip

    def run(data: bytes) -> None:
        payload = base64.urlsafe_b64encode(data).decode().rstrip("=")
        sealed = f"molora1.{payload}.{hash_bytes(payload.encode())[:8]}"
        for line in (data.decode("utf-8", "replace"), sealed):
            try:
                parse_invitation(line)
            except ConfigError as error:
                fault = error
                continue
            return
        raise fault

    return [json.dumps(asdict(invitation)).encode()], run


def _prepare_manifests(folder: Path) -> tuple[Sequence[bytes], Run]:
    contribution = KEPT / "kept" / "contributions"
    seeds = [path.read_bytes() for path in sorted(contribution.rglob(MANIFEST_FILE))]
    return seeds, lambda data: parse_manifest(data) and None


def _prepare_adapter(kind: str, precision: str, file: str):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        model = build_tiny_model("gpt_neox")
        adapter = build_random_adapter(model, kind=kind, strength=1e-3)
        options = LinearOptions(precision=precision, group=8) if precision != "float32" else None
        save_adapter(adapter, model, folder / "adapter", options=options)
        path = folder / "adapter" / file
        rules = AdapterRules(max_rank=8, max_bytes=2**20)
        seeds = [path.read_bytes()]
        return seeds, _replacing(path, lambda: load_adapter(folder / "adapter", rules=rules))

    return prepare


def _prepare_samples(folder: Path) -> tuple[Sequence[bytes], Run]:
    tokens = np.arange(48, dtype=np.int32).reshape(3, 16)
    blocks = Blocks("legal", Split.ADMISSION, tokens, tokens * 0, tokens * 0)
    path = folder / "sample.safetensors"
    return [blocks.to_bytes()], _replacing(path, lambda: load_blocks(path, max_bytes=2**20))


def _prepare_charters(folder: Path) -> tuple[Sequence[bytes], Run]:
    seeds = [path.read_bytes() for path in sorted(KEPT.rglob("cooperative.toml"))]
    return seeds, lambda data: parse_charter(data.decode("utf-8", "replace")) and None


def _prepare_base(file: str):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        base = build_tiny_checkpoint(folder / "base", "gpt_neox", 0)
        path = base / file
        return [path.read_bytes()], _replacing(path, lambda: load_base(base))

    return prepare


def _prepare_parquet(folder: Path) -> tuple[Sequence[bytes], Run]:
    path = folder / "text.parquet"
    texts = ["One document.", "Another, with ä and 数."]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)

    def read() -> None:
        # As the product does, in another process: the library may end it. But without starting
        # another interpreter for each file.
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            faulthandler.disable()  # that it ends by a signal is no news
            with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as stream:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                write_texts(path, 2**22, stream)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream, contextlib.suppress(EOFError, UnreadableError):
            list(read_texts(stream))
        os.waitpid(child, 0)

    return [path.read_bytes()], _replacing(path, read)


def _prepare_corpus(suffix: str):
    def prepare(folder: Path) -> tuple[Sequence[bytes], Run]:
        path = folder / f"text{suffix}"
        texts = ["One document.", "Another, with ä and 数."]
        if suffix == ".jsonl":
            seeds = ["\n".join(json.dumps({"text": text}) for text in texts).encode()]
        else:
            seeds = [text.encode() for text in texts]
        return seeds, _replacing(path, lambda: list(islice(read_documents([path]), 10_000)))

    return prepare


def _prepare_traces(folder: Path) -> tuple[Sequence[bytes], Run]:
    run_folder, exported = folder / "run", folder / "run.jsonl"
    with TraceWriter(run_folder, key=_KEY, run_id="run", writer="main") as trace:
        for number in range(4):
            trace.append("decision", {"task": f"t{number}", "text": "ä" * number})
        trace.seal()
    export_run(run_folder, exported)
    public = build_public_pem(_KEY)

    def check() -> None:
        verify(exported, public)
        list(read_records(exported))

    return [exported.read_bytes()], _replacing(exported, check)


def _prepare_reports(folder: Path) -> tuple[Sequence[bytes], Run]:
    path = folder / "report.json"
    return [(KEPT / "report.json").read_bytes()], _replacing(path, lambda: load_report(path))


def _prepare_pages(folder: Path) -> tuple[Sequence[bytes], Run]:
    path = folder / "report.json"

    def check() -> None:
        write_report(load_report(path), {}, folder / "report")

    return [(KEPT / "report.json").read_bytes()], _replacing(path, check)


_FILES_OF_ADAPTERS = ("_file_size", "load_", "_check_")
PARSERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "mail": {
        "molora_fed.federation.wire": ("unpack_envelope",),
        "molora_fed.federation.envelopes": ("parse_",),
        "molora_fed.federation.messages": ("parse_",),
    },
    "invitations": {"molora_fed.federation.invitations": ("parse_invitation",)},
    "manifests": {
        "molora_fed.contributions.manifest": (
            "parse_manifest", "_validate", "_check_", "Manifest.", "FileEntry.", "SampleEntry.",
        ),
    },
    "adapters": {
        "molora_fed.adapters.files": _FILES_OF_ADAPTERS,
        "molora_fed.adapters.headers": (*_FILES_OF_ADAPTERS, "check_", "read_", "opened"),
        "molora_fed.adapters.low_rank_files": ("load_", "read_"),
        "molora_fed.adapters.peft_config": ("_check_", "read_", "_read_", "_compile", "Name"),
        "molora_fed.adapters.peft_keys": ("read_keys", "_check_", "_read_", "_strip"),
        "molora_fed.adapters.peft_tensors": ("resolve_", "_check_", "_name_", "_pair"),
        "molora_fed.adapters.delta_files": ("load_", "_check_"),
        "molora_fed.adapters.quantised_files": (
            "load_", "_load_", "_check_", "_read", "_parts", "_expect_", "_Module", "is_quantised",
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
            "load_json_file", "find_", "count_tensors", "_find_tensors", "stage_checkpoint",
        ),
    },
    "corpora": {
        "molora_fed.corpus.documents": ("read_documents", "_read_", "_decode", "_list_", "_find_"),
        "molora_fed.corpus.parquet": ("",),
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
            f"mail-{sender}", "mail", mutate_json, _prepare_mail(sender, letters), fuzzed=100_000
        )
        for sender, letters in (("server", _FROM_SERVER), ("contributor", _FROM_CONTRIBUTOR))
    ),
    Target("invitation", "invitations", mutate_json, _prepare_invitations, fuzzed=100_000),
    Target("manifest", "manifests", mutate_json, _prepare_manifests),
    *(
        Target(
            f"adapter-{kind}-{precision}-{name}", "adapters", mutate,
            _prepare_adapter(kind, precision, file),
        )
        for kind, precision in (("lora", "float32"), ("delta", "float32"), ("svd", "int4"))
        for name, file, mutate in (
            ("weights", WEIGHTS_FILE, mutate_safetensors),
            ("config", CONFIG_FILE, mutate_json),
            ("meta", META_FILE, mutate_json),
        )
    ),
    Target("samples", "samples", mutate_safetensors, _prepare_samples),
    Target("charter", "charters", mutate_toml, _prepare_charters),
    Target(
        "base-config", "base folders", mutate_json, _prepare_base("config.json"), inputs=12,
        fuzzed=20_000,
    ),
    *(
        Target(
            f"corpus-{suffix[1:]}", "corpora", mutate, _prepare_corpus(suffix), fuzzed=100_000
        )
        for suffix, mutate in ((".txt", change_bytes), (".jsonl", mutate_lines))
    ),
    Target(
        "corpus-parquet", "corpora", change_bytes, _prepare_parquet, inputs=30, fuzzed=20_000
    ),
    Target("trace", "traces", mutate_lines, _prepare_traces),
    Target("report", "reports", mutate_json, _prepare_reports),
    Target("report-page", "reports", mutate_json, _prepare_pages, inputs=4, fuzzed=1_000),
)  # fmt: skip
