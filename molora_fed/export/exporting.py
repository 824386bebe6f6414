"""One export from a subject to a folder that is whole or not there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from molora_fed.adapters.files import WEIGHTS_FILE
from molora_fed.errors import ConfigError
from molora_fed.export.card import Card, write_card
from molora_fed.export.gguf_base import write_base
from molora_fed.export.gguf_layout import find_layout
from molora_fed.export.gguf_lora import write_lora, write_mixture
from molora_fed.export.merging import concatenate, file_dtype, write_checkpoint
from molora_fed.export.peft_folders import approximate, write_peft
from molora_fed.export.subject import Specialist, Subject, Weights, choose_weights
from molora_fed.storage.files import replace_folder
from molora_fed.types import Progress

__all__ = ["Choices", "Exported", "export_model"]

Form = Literal["peft", "merged", "gguf"]
Merge = Literal["adapter", "checkpoint"]


@dataclass(frozen=True)
class Choices:
    """What an export is to be.

    Attributes:
        to: PEFT folders, one merged model, or GGUF files.
        merge: Of "merged": one adapter, or a whole checkpoint.
        weights: As for `choose_weights`.
        rank: R of the factors that dense differences are approximated by; None approximates
            nothing.
        dtype: Of a GGUF base: float32, float16 or bfloat16; None takes that of the base's files.
    """

    to: Form
    merge: Merge = "adapter"
    weights: str | None = None
    rank: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        rows: Name of each file or folder in it, and what it is.
        weights: Of a merge or a mixture; None of PEFT folders.
        notes: What to know, a line each.
    """

    folder: Path
    rows: tuple[tuple[str, str], ...]
    weights: Weights | None
    notes: tuple[str, ...]


def export_model(
    subject: Subject,
    out: Path,
    choices: Choices,
    *,
    trace_root: str = "",
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> Exported:
    """Write a subject in a form that other programs load, with a README.

    Args:
        subject: What is exported.
        out: A new or empty folder; it appears whole or not at all.
        choices: In which form.
        trace_root: Merkle root of the cooperative's trace, hex, for the README; "" without one.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        ConfigError: If the target holds something, or a choice does not fit the subject.
        AdapterError: If an adapter cannot be written in this form.
        StorageError: On I/O errors.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"Cannot export into '{out}': expected a new or empty folder, got one that holds "
            "something. Choose another --out."
        )
    _check_fits(subject, choices)
    subject, notes = _shorten(subject, choices)
    run = _Run(subject, choices, trace_root, on_phase, progress)
    with replace_folder(out) as target:
        rows, weights, more = run.write(target)
        notes = (*notes, *more)
        card = Card(subject, choices.to, choices.merge, rows, weights, notes, trace_root)
        write_card(card, target)
    return Exported(out, rows, weights, notes)


def _check_fits(subject: Subject, choices: Choices) -> None:
    """Refuse what there is nothing to write of, before any work."""
    if not subject.specialists and choices.to != "gguf":
        raise ConfigError(
            f"Cannot export '{subject.base.folder}' as {choices.to}: expected a fused or evolved "
            "model or a specialist, got a base alone. A base alone is exported with --to gguf."
        )
    if choices.weights is not None and (choices.to == "peft" or not subject.specialists):
        raise ConfigError(
            "Cannot use weights: expected an export that mixes, got "
            f"{'a base alone' if choices.to == 'gguf' else 'one folder a specialist'}. Leave out "
            "--weights."
        )
    if choices.dtype is not None and choices.to != "gguf":
        raise ConfigError(
            f"Cannot use dtype {choices.dtype}: expected --to gguf, got --to {choices.to}, where "
            "numbers keep their dtype. Leave out --dtype."
        )


def _shorten(subject: Subject, choices: Choices) -> tuple[Subject, tuple[str, ...]]:
    """Factors for what has none, where they were asked for."""
    if choices.rank is None:
        return subject, ()
    made: list[Specialist] = []
    notes: list[str] = []
    for each in subject.specialists:
        if each.is_low_rank:
            made.append(each)
            continue
        found = approximate(each, choices.rank)
        made.append(found.specialist)
        biases = f", and {found.lost_biases} changes of biases" if found.lost_biases else ""
        notes.append(
            f"{each.name}: written as factors of rank {choices.rank}, which lose "
            f"{100 * found.lost_fraction:.3g} % of the difference by Frobenius norm{biases}."
        )
    return replace(subject, specialists=tuple(made)), tuple(notes)


_Written = tuple[tuple[tuple[str, str], ...], Weights | None, tuple[str, ...]]


@dataclass(frozen=True)
class _Run:
    """The writing of one export into a temporary folder."""

    subject: Subject
    choices: Choices
    trace_root: str
    on_phase: Callable[[str], None]
    progress: Progress | None

    def write(self, target: Path) -> _Written:
        """Files with what they are, the weights behind them, and notes."""
        match self.choices.to:
            case "peft":
                return self._write_peft(target)
            case "merged":
                return self._write_merged(target)
            case "gguf":
                return self._write_gguf(target)

    def _write_peft(self, target: Path) -> _Written:
        rows: list[tuple[str, str]] = []
        notes: list[str] = []
        for each in self.subject.specialists:
            self.on_phase(f"writing {each.name}")
            folder = target / each.name
            if each.is_low_rank:
                write_peft(each.adapter, self.subject.base, folder)
                what = f"PEFT adapter, rank {each.adapter.max_rank}"
                rows.append((each.name, what))
                self._write_own_card(each, folder, what)
                continue
            folder.mkdir()
            alone = {other.name: float(other is each) for other in self.subject.specialists}
            write_checkpoint(self.subject, alone, folder, progress=self.progress)
            rows.append((each.name, "whole checkpoint, base and specialist merged"))
            notes.append(
                f"{each.name}: its differences are dense (kind {each.adapter.kind}), which PEFT "
                "cannot hold; a merged checkpoint was written instead. --rank R writes factors "
                "that come near."
            )
        return tuple(rows), None, tuple(notes)

    def _write_own_card(self, specialist: Specialist, folder: Path, what: str) -> None:
        """A README beside an adapter, which may be passed on without the others."""
        alone = replace(self.subject, specialists=(specialist,))
        rows = ((WEIGHTS_FILE, what),)
        write_card(Card(alone, "peft", "adapter", rows, None, (), self.trace_root), folder)

    def _write_merged(self, target: Path) -> _Written:
        subject = self.subject
        weights = choose_weights(subject, self.choices.weights)
        if self.choices.merge == "adapter":
            self.on_phase("merging adapters")
            merged = concatenate(subject.specialists, weights.values)
            write_peft(merged, subject.base, target)
            what = f"PEFT adapter, rank {merged.max_rank}, exactly the weighted sum"
            return ((WEIGHTS_FILE, what),), weights, ()
        self.on_phase("merging into the base")
        write_checkpoint(subject, weights.values, target, progress=self.progress)
        what = f"whole checkpoint in {file_dtype(subject.base)}"
        return (("model.safetensors", what),), weights, ()

    def _write_gguf(self, target: Path) -> _Written:
        subject = self.subject
        layout = find_layout(subject.base)
        for each in subject.specialists:
            layout.check_adapter(each)
        dtype = self.choices.dtype or file_dtype(subject.base)
        self.on_phase("writing the base")
        write_base(subject.base, layout, target / "base.gguf", dtype, self.progress)
        rows = [("base.gguf", f"the base in {dtype}")]
        for each in subject.specialists:
            self.on_phase(f"writing {each.name}")
            write_lora(each, subject.base, layout, target / f"{each.name}.gguf")
            rows.append((f"{each.name}.gguf", f"LoRA in float32, rank {each.adapter.max_rank}"))
        if not subject.specialists:
            return tuple(rows), None, layout.notes
        weights = choose_weights(subject, self.choices.weights)
        write_mixture(subject, weights, target / "mixture.json")
        rows.append(("mixture.json", "requests that mix them, for llama-server"))
        return tuple(rows), weights, layout.notes
