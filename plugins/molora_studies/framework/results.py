"""A study from its options to its files: plan, run, summarise, write."""

import importlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as memo
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from molora_fed import __version__
from molora_fed.errors import ConfigError, StudyError
from molora_fed.models.runtime import choose_placement
from molora_fed.plugins import Registry
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import canonical_json, hash_bytes, hash_file, write_bytes, write_json
from molora_fed.storage.settings import describe_offenders
from molora_fed.storage.toml import parse_toml
from molora_studies.framework.contract import Cell, Study, StudyOptions, Summary, Table, Task
from molora_studies.framework.render import draw_figure, render_study
from molora_studies.framework.runner import Listener, State, run_tasks
from molora_studies.framework.schedule import collect_tasks, estimate_seconds, find_missing
from molora_studies.framework.store import TaskStore
from molora_studies.framework.substrate import BaseSettings

__all__ = [
    "FORMAT_VERSION",
    "PlannedStudy",
    "StudyPlan",
    "Written",
    "describe_summary",
    "hash_code",
    "hash_code_of",
    "hash_package",
    "plan_study",
    "read_options",
    "state_overlap",
    "write_files",
]

FORMAT_VERSION = 2
MAX_CONFIG_BYTES = 2**20
_OVERLAP_SHARES = ("own", "union", "base", "after")
_OVERLAP = (
    "domain", "word 8-grams in its own train text", "in any domain's", "in the base's",
    "blocks left out of every figure", "in any of them, of the blocks kept",
)  # fmt: skip
_FUSIONS = frozenset({"fuse-members", "run-twenty"})
_NOT_COMPARED = (
    "Measured before held-out blocks that lie in another domain's or the base's train text were "
    "left out of every figure; docs/results/contamination.md says how many there are."
)


@dataclass(frozen=True)
class StudyPlan:
    """What a run would do.

    Attributes:
        cells: Number of cells.
        tasks: All tasks by key, needs first.
        done: Keys of those that are finished.
        seconds: Estimate of the rest on so many quiet cores.
        workers: That number.
    """

    cells: int
    tasks: Mapping[str, Task]
    done: frozenset[str]
    seconds: float
    workers: int


@dataclass(frozen=True)
class Written:
    """What a study leaves.

    Attributes:
        document: Content of the JSON file.
        files: The JSON file, the Markdown page, then the figures.
    """

    document: Mapping[str, Any]
    files: Sequence[Path]


def read_options(study: type[Study], name: str, config: Path | None, **changes: Any) -> Any:
    """Options of a study from its TOML file, or their defaults.

    Args:
        study: The study.
        name: Its name, for errors.
        config: TOML file; None takes every default.
        **changes: Values that replace the file's.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown, or a value is out of range.
    """
    where = f"Cannot read options of study '{name}'" + (f" from '{config}'" if config else "")
    values: dict[str, Any] = {}
    if config is not None:
        try:
            if config.stat().st_size > MAX_CONFIG_BYTES:
                raise ConfigError(
                    f"{where}: expected at most {MAX_CONFIG_BYTES} bytes, got "
                    f"{config.stat().st_size}. Check that this is the right file."
                )
            text = config.read_text(encoding="utf-8")
            values = parse_toml(text, max_bytes=MAX_CONFIG_BYTES)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{where}: expected TOML, got {reason}. Correct the file.") from error
    try:
        return study.Options.model_validate({**values, **changes})
    except ValidationError as error:
        offenders = describe_offenders(error, with_values=True)
        raise ConfigError(
            f"{where}: expected keys and values that it knows, got {offenders}. Correct these; "
            f"it knows {', '.join(sorted(study.Options.model_fields))}."
        ) from error


@dataclass(frozen=True)
class PlannedStudy:
    """A study with its options and cells.

    Attributes:
        name: Registered name.
        origin: Distribution and version that registered it.
        study: The class.
        options: Its options.
        cells: Its cells.
        cache: Folder of everything that is kept between runs.
    """

    name: str
    origin: str
    study: type[Study]
    options: StudyOptions
    cells: Sequence[Cell]
    cache: Path

    @property
    def tasks(self) -> list[Task]:
        """The cells' tasks."""
        return [cell.task for cell in self.cells]

    def survey(self, workers: int) -> StudyPlan:
        """What there is to do, and how long it takes on so many cores."""
        store, tasks = TaskStore.in_cache(self.cache), collect_tasks(self.tasks)
        done = frozenset(set(tasks) - find_missing(self.tasks, store.is_done))
        seconds = estimate_seconds(tasks, done, workers)
        return StudyPlan(len(self.cells), tasks, done, seconds, workers)

    def run(self, workers: int, listener: Listener | None = None) -> State:
        """Do what is left; see `molora_studies.framework.runner.run_tasks`."""
        return run_tasks(self.tasks, self.cache, workers=workers, listener=listener)

    def write(self, out: Path, *, seconds: float | None = None) -> Written:
        """Summarise finished cells, and write JSON, Markdown and figures.

        Args:
            out: Folder.
            seconds: Wall-clock seconds of the run; None if nothing ran.

        Raises:
            StudyError: If a cell is not finished.
            StorageError: On I/O errors.
        """
        store = TaskStore.in_cache(self.cache)
        missing = [cell.name for cell in self.cells if not store.is_done(cell.task)]
        if missing:
            raise StudyError(
                f"Cannot summarise study '{self.name}': expected all {len(self.cells)} cells, got "
                f"{len(self.cells) - len(missing)}; missing {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}. Run `molora study {self.name}`."
            )
        read = {cell.name: store.read(cell.task) for cell in self.cells}
        results = {name: done.result for name, (done, _) in read.items()}
        summary = self.study.summarise(self.options, results)
        overlap = self._find_overlap(store)
        summary = state_overlap(summary, overlap, self.tasks)
        document = self._describe(summary, results)
        if overlap:
            document["overlap"] = overlap
        task_seconds = {
            f"{task.name} ({task.key[:8]})": store.read(task)[1]
            for task in collect_tasks(self.tasks).values()
            if store.is_done(task)
        }
        document["seconds"] = {"run": seconds, "tasks": task_seconds}
        return write_files(out, document, summary)

    def _find_overlap(self, store: TaskStore) -> dict[str, Any]:
        """Contamination of held-out text, the worst of all fusions; empty if none says it."""
        tasks = [task for task in collect_tasks(self.tasks).values() if store.is_done(task)]
        found = [store.read(task)[0].result.get("overlap") for task in tasks]
        by_domain: dict[str, list[Mapping[str, Any]]] = {}
        for domain, row in (item for each in found if each for item in each.items()):
            by_domain.setdefault(domain, []).append(row)
        if not by_domain:
            return {}
        return {
            "fusions": sum(bool(each) for each in found),
            "domains": {
                domain: {
                    **max(measured, key=lambda row: row["left_out"]),
                    **{name: _find_worst(measured, name) for name in _OVERLAP_SHARES},
                }
                for domain, measured in sorted(by_domain.items())
            },
        }

    def _describe(
        self, summary: Summary, results: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        from molora_fed.models.runtime import describe_environment

        return {
            "format_version": FORMAT_VERSION,
            "study": self.name,
            "title": self.study.title,
            "options": self.options.model_dump(mode="json"),
            "seeds": list(self.options.seeds),
            "versions": {"molora-fed": __version__, **describe_environment("cpu")},
            "code": {"origin": self.origin, **hash_code(self.study)},
            "cells": [
                {
                    "name": cell.name,
                    "labels": dict(cell.labels),
                    "key": cell.task.key,
                    "result": results[cell.name],
                }
                for cell in self.cells
            ],
            "summary": describe_summary(summary),
        }


def state_overlap(summary: Summary, overlap: Mapping[str, Any], tasks: Sequence[Task]) -> Summary:
    """The summary with the contamination of its held-out text, or a note that it is not known.

    Args:
        summary: What a study says.
        overlap: `overlap` of its JSON document; empty in one from before there was any.
        tasks: The study's tasks.
    """
    if overlap:
        rows = [
            (
                domain,
                *(_show_share(row[name]) for name in _OVERLAP_SHARES[:3]),
                f"{row['left_out']} of {row['blocks']}",
                _show_share(row["after"]),
            )
            for domain, row in overlap["domains"].items()
        ]
        title = f"Contamination of held-out text, the worst of {overlap['fusions']}"
        return replace(summary, tables=[*summary.tables, Table(title, _OVERLAP, rows)])
    if any(task.action in _FUSIONS for task in collect_tasks(tasks).values()):
        return replace(summary, notes=[*summary.notes, _NOT_COMPARED])
    return summary


def describe_summary(summary: Summary) -> dict[str, Any]:
    """A summary as JSON values."""
    return {
        "findings": dict(summary.findings),
        "claims": [asdict(claim) for claim in summary.claims],
        "tables": [
            {
                "title": table.title,
                "columns": list(table.columns),
                "rows": [list(row) for row in table.rows],
            }
            for table in summary.tables
        ],
        "figures": [{"name": figure.name, "caption": figure.caption} for figure in summary.figures],
        "notes": list(summary.notes),
    }


def write_files(out: Path, document: dict[str, Any], summary: Summary) -> Written:
    """Write a study's JSON file, page and figures.

    Args:
        out: Folder.
        document: Content of the JSON file.
        summary: Its summary, for the figures.

    Raises:
        StudyError: If the document holds what JSON cannot.
        StorageError: On I/O errors.
    """
    name = document["study"]
    try:
        canonical_json(document)
    except (TypeError, ValueError) as error:
        raise StudyError(
            f"Cannot write study '{name}': expected finite JSON values in its summary, "
            f"got {error}. Correct `summarise`."
        ) from error
    figures = [(out / f"{name}-{figure.name}.svg", figure) for figure in summary.figures]
    for path, figure in figures:
        write_bytes(path, draw_figure(figure))
    page, data = out / f"{name}.md", out / f"{name}.json"
    write_bytes(page, render_study(document).encode())
    write_json(data, document)
    return Written(document, [data, page, *(path for path, _ in figures)])


def _find_worst(measured: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The largest of some shares; None where none was measured."""
    return max((row[name] for row in measured if row[name] is not None), default=None)


def _show_share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


@memo
def hash_package(name: str) -> str:
    """SHA-256 over a package's Python files, or a module's: what exactly made a result.

    Empty if it has none.
    """
    module = importlib.import_module(name)
    folders = list(getattr(module, "__path__", ()))
    if not folders:
        file = getattr(module, "__file__", None)
        return hash_file(Path(file)) if file else ""
    root = Path(folders[0])
    files = {str(p.relative_to(root)): hash_file(p) for p in sorted(root.rglob("*.py"))}
    return hash_bytes(canonical_json(files))


def hash_code_of(package: str) -> str:
    """SHA-256 of a package; of one that cannot be imported by its name a new one every time."""
    try:
        return hash_package(package)
    except ImportError:
        return uuid.uuid4().hex


def hash_code(study: type[Study]) -> dict[str, str]:
    """SHA-256 of the packages that make a study's result, by name."""
    packages = ("molora_fed", study.__module__.partition(".")[0], *study.measures)
    return {name: found for name in dict.fromkeys(packages) if (found := hash_package(name))}


def _place_base(options: StudyOptions, name: str, compute: Compute) -> StudyOptions:
    base = getattr(options, "base", None)
    if not isinstance(base, BaseSettings):
        raise ConfigError(
            f"Cannot choose where study '{name}' runs: expected options with a base, got none. "
            "Leave out --device and --dtype."
        )
    placement = choose_placement(compute, base.dtype)
    chosen = {
        "device": str(placement.device),
        "dtype": str(placement.dtype).removeprefix("torch."),
    }
    return options.model_copy(update={"base": base.model_copy(update=chosen)})


def plan_study(
    name: str,
    studies: Registry,
    cache: Path,
    *,
    config: Path | None = None,
    compute: Compute | None = None,
    **changes: Any,
) -> PlannedStudy:
    """Read a study's options and plan its cells; nothing runs.

    Args:
        name: Registered name.
        studies: What is registered.
        cache: Folder of everything that is kept between runs.
        config: TOML file of options.
        compute: Where its base and all that rests on it run; None leaves it to the options.
        **changes: Options that replace the file's.

    Raises:
        UnknownNameError: If nobody registered it.
        ConfigError: If its options are wrong, or it has no base to run elsewhere.
        ComputeError: If this machine lacks the device, or the device the dtype.
        StudyError: If two cells have one name.
    """
    study = studies.resolve(name)
    options = read_options(study, name, config, **changes)
    if compute is not None:
        options = _place_base(options, name, compute)
    cells = tuple(study.plan(options))
    names = [cell.name for cell in cells]
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice or not cells:
        raise StudyError(
            f"Cannot plan study '{name}': expected cells with names of their own, got "
            f"{', '.join(twice) + ' more than once' if twice else 'no cell'}. Correct its plan."
        )
    return PlannedStudy(name, studies.entry(name).origin, study, options, cells, cache)
