"""Kept results judged anew: summaries and pages from the cells alone, nothing runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from molora_fed.errors import ConfigError, StudyError, UnknownNameError
from molora_fed.plugins import Registry
from molora_fed.storage.settings import describe_offenders
from molora_studies.framework.contract import Cell, Study, Summary, Task
from molora_studies.framework.render import read_documents
from molora_studies.framework.results import (
    FORMAT_VERSION,
    Written,
    describe_summary,
    hash_code,
    state_overlap,
    write_files,
)

__all__ = ["Change", "Rejudged", "plan_kept", "rejudge_document", "rejudge_folder"]

_NEEDED = frozenset({"cells", "options", "seconds", "seeds", "title", "versions"})


@dataclass(frozen=True)
class Change:
    """A verdict that came out otherwise.

    Attributes:
        claim: The claim, as it reads now.
        before: The kept verdict; None if it is a new claim.
        after: The verdict now; None if the claim is gone.
    """

    claim: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Rejudged:
    """A result judged anew.

    Attributes:
        written: What was written.
        changes: Verdicts that changed.
    """

    written: Written
    changes: Sequence[Change]


def plan_kept(study: type[Study], document: Mapping[str, Any]) -> list[Cell]:
    """The cells of a kept result, as they were planned when it was made.

    Args:
        study: The study.
        document: Its JSON document, whose options the study takes.

    Returns:
        Today's plan; of a result from before fusions left out held-out blocks in known text, the
        plan of then, so that its tasks keep their keys.
    """
    cells = study.plan(study.Options.model_validate(document["options"]))
    if "overlap" in document:
        return list(cells)
    return [replace(cell, task=_plan_without_exclusion(cell.task)) for cell in cells]


def _plan_without_exclusion(task: Task) -> Task:
    """The task in its first version, where fusions did not need the base's text."""
    needs = [_plan_without_exclusion(need) for need in task.needs]
    settings, version = dict(task.settings), 1
    if "base_text" in settings:  # a fusion, or what is planned like one
        needs = needs[: len(needs) - settings.pop("base_text")]
    elif task.action == "run-twenty":
        needs = needs[:1]
    elif task.action == "refit-routers":
        needs = [needs[0], *needs[0].needs]
    else:
        version = task.version
    return replace(task, settings=settings, needs=tuple(needs), version=version)


def rejudge_document(
    document: Mapping[str, Any], studies: Registry, where: str
) -> tuple[dict[str, Any], Summary]:
    """Sum up a result's cells with the study's code of today.

    Args:
        document: A study's JSON document, of any format version.
        studies: What is registered.
        where: Its file, for errors.

    Returns:
        The document with its summary replaced and, under `judged`, the code that made it; all
        else, cells included, stays. And the summary.

    Raises:
        StudyError: If nobody registered its study, or its options or cells are not the study's.
    """
    name = document["study"]
    failed = f"Cannot judge '{where}' anew"
    absent = sorted(_NEEDED - document.keys())
    if absent:
        raise StudyError(
            f"{failed}: expected a study's result with its cells, got none of "
            f"{', '.join(absent)}. Run the study again."
        )
    try:
        study = studies.resolve(name)
    except UnknownNameError as error:
        raise StudyError(
            f"{failed}: expected a study that is installed, got '{name}'. "
            "`molora study --list` shows all."
        ) from error
    try:
        options = study.Options.model_validate(document["options"])
    except ValidationError as error:
        raise StudyError(
            f"{failed}: expected options of study '{name}', got "
            f"{describe_offenders(error, with_values=True)}. Run the study again."
        ) from error
    results = {cell["name"]: cell["result"] for cell in document["cells"]}
    planned = study.plan(options)
    missing = [cell.name for cell in planned if cell.name not in results]
    if missing:
        raise StudyError(
            f"{failed}: expected all cells of study '{name}', got none named "
            f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}. "
            "Run the study again."
        )
    try:
        summary = study.summarise(options, results)
    except LookupError as error:
        raise StudyError(
            f"{failed}: expected cells as study '{name}' makes them today, got one without "
            f"{error}. Run the study again."
        ) from error
    summary = state_overlap(summary, document.get("overlap", {}), [cell.task for cell in planned])
    new = {
        **document,
        "format_version": FORMAT_VERSION,
        "summary": describe_summary(summary),
        "judged": {"origin": studies.entry(name).origin, **hash_code(study)},
    }
    return new, summary


def rejudge_folder(folder: Path, studies: Registry, out: Path) -> list[Rejudged]:
    """Judge all results in a folder anew, and write them only if all could be judged.

    Args:
        folder: Holds studies' JSON files; other JSON files are passed over.
        studies: What is registered.
        out: Folder to write to; may be the same.

    Raises:
        ConfigError: If the folder holds no result.
        StudyError: If one cannot be judged; nothing is written then.
        StorageError: On I/O errors.
    """
    found = list(read_documents(folder))
    if not found:
        raise ConfigError(
            f"Cannot judge '{folder}' anew: expected results of studies, got none. "
            "Run `molora study NAME --out` into it."
        )
    judged = [rejudge_document(document, studies, str(path)) for path, document in found]
    return [
        Rejudged(
            write_files(out, new, summary),
            _list_changes(old["summary"]["claims"], new["summary"]["claims"]),
        )
        for (_, old), (new, summary) in zip(found, judged, strict=True)
    ]


def _list_changes(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[Change]:
    before = {claim["claim"]: claim["verdict"] for claim in old}
    after = {claim["claim"]: claim["verdict"] for claim in new}
    return [
        Change(claim, before.get(claim), after.get(claim))
        for claim in dict.fromkeys([*after, *before])
        if before.get(claim) != after.get(claim)
    ]
