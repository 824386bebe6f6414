"""Conformance checks of domains: what they read on this machine, twice."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from molora_fed.corpus.documents import find_document_fault
from molora_fed.guard import one_line
from molora_fed.testing.findings import (
    CheckResult,
    describe_raised,
    examine,
    refuse_broken,
)
from molora_fed.testing.targets import open_target, other_chance
from molora_fed.types import Document

__all__ = ["check_domain_conformance", "examine_domain"]

MOST_DOCUMENTS = 500
"""Documents that are looked at; a domain may have many more."""

MOST_CHARACTERS = 5_000_000


def check_domain_conformance(target: Any, options: Any = None) -> None:
    """Check a domain against the whole contract, on the text that it reads on this machine.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = f"Domain '{getattr(target, '__name__', target)}'"
    refuse_broken(title, examine_domain(target, options), page="docs/hooks/domains.md")


def examine_domain(target: Any, options: Any = None) -> tuple[CheckResult, ...]:
    """What `check_domain_conformance` finds, one result a check.

    Args:
        target: What is registered: a function, or a class with options.
        options: Options of the class; its defaults if None.
    """
    name = "reads documents"
    start = time.monotonic()
    try:
        read = open_target(target, options)
        first = _take(read())
    except (Exception, SystemExit) as error:  # nothing else can be asked of it
        return (CheckResult(name, f"expected documents, got {describe_raised(error)}"),)
    if not first:
        return (CheckResult(name, "expected documents, got none: is its text on this machine?"),)
    remark = f"{len(first)} documents looked at, read in {time.monotonic() - start:.1f} s"
    results = examine(_CHECKS, _Subject(read, first))
    return (CheckResult(name, None, remark), *results)


def _take(documents: Iterable[Any]) -> list[Any]:
    """The documents that are looked at."""
    found, characters = [], 0
    for document in islice(documents, MOST_DOCUMENTS):
        found.append(document)
        text = getattr(document, "text", "")
        characters += len(text) if isinstance(text, str) else 0
        if characters > MOST_CHARACTERS:
            break
    return found


@dataclass(frozen=True)
class _Subject:
    read: Callable[[], Iterable[Any]]
    documents: list[Any]


def _gives_documents_of_unicode_text(subject: _Subject) -> str | None:
    for number, document in enumerate(subject.documents):
        fault = find_document_fault(document)
        if fault is not None:
            return f"expected Documents of text, got {fault} (number {number})"
    return None


def _documents_are_not_empty(subject: _Subject) -> str | None:
    empty = [d for d in _list_sound(subject) if not d.text.strip()]
    if not empty:
        return None
    names = ", ".join(repr(one_line(d.name, 60)) for d in empty[:3])
    return f"expected documents with text, got {len(empty)} without: {names}"


def _names_are_unique(subject: _Subject) -> str | None:
    counts = Counter(document.name for document in _list_sound(subject))
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        names = ", ".join(repr(one_line(name, 60)) for name in twice[:3])
        return f"expected a name of its own for every document, got {names} more than once"
    return None


def _names_are_of_no_machine(subject: _Subject) -> str | None:
    """Relative to the source: the same text has the same names wherever it lies."""
    rooted = [d.name for d in _list_sound(subject) if d.name.startswith(("/", "\\", "~"))]
    if rooted:
        return f"expected names relative to the source, got '{one_line(rooted[0], 80)}'"
    return None


def _reads_the_same_twice(subject: _Subject) -> str | None:
    with other_chance():
        again = _take(subject.read())
    if again == subject.documents:
        return None
    if sorted(map(repr, again)) == sorted(map(repr, subject.documents)):
        return "expected the same order on two reads, got another (sort what you list)"
    return f"expected the same documents on two reads, got {len(again)} that differ"


def _markup_lies_inside_the_text(subject: _Subject) -> str | None:
    for document in _list_sound(subject):
        markup = document.markup
        if markup is None:
            continue
        spans = (*markup.special, *markup.frame, *(markup.answers or ()))
        if any(not 0 <= first < end <= len(document.text) for first, end in spans):
            return f"expected spans inside the text, got others in '{one_line(document.name, 80)}'"
    return None


def _list_sound(subject: _Subject) -> list[Document]:
    return [each for each in subject.documents if find_document_fault(each) is None]


_CHECKS: tuple[Callable[[_Subject], str | None], ...] = (
    _gives_documents_of_unicode_text,
    _documents_are_not_empty,
    _names_are_unique,
    _names_are_of_no_machine,
    _reads_the_same_twice,
    _markup_lies_inside_the_text,
)
