"""What is exported: a base with its specialists, what a report says of them, and their weights."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora_fed.adapters.updates import Adapter
from molora_fed.errors import ConfigError
from molora_fed.inference.opening import Model, PlainModel, open_model
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.population.bundle import EvolvedModel
from molora_fed.population.slots import slot_adapter
from molora_fed.reporting.report import find_report, load_report
from molora_fed.routing.fused import FusedModel
from molora_fed.storage.compute import Compute
from molora_fed.storage.untrusted import clean
from molora_fed.types import BASE_EXPERT

__all__ = ["Specialist", "Subject", "Weights", "choose_weights", "open_subject"]

_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_NAME = 63
_EXACT = Compute(device="cpu", dtype="float32")
"""A base's numbers as they are: float32 holds those of float16 and bfloat16 exactly."""


@dataclass(frozen=True, eq=False)
class Specialist:
    """One adapter under a name that may be a file's.

    Attributes:
        name: Letters, digits, dashes and underscores; of one subject all differ, in lower case
            too.
        adapter: What it adds to the base.
        domain: What it was trained on; None if unknown.
    """

    name: str
    adapter: Adapter
    domain: str | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether factors alone say all of it: no dense difference and no change of a bias."""
        updates = self.adapter.updates.values()
        return all(update.rank is not None and update.bias is None for update in updates)


@dataclass(frozen=True, eq=False)
class Subject:
    """A base with its specialists, opened for export.

    Attributes:
        kind: "fused", "evolved", "specialist" or "base".
        base: The base, in float32 on the CPU.
        specialists: In the order of the model's gates; empty for a base alone.
        router: Registered name of the router; "" without one.
        mixture: How the router's gates mix: "probability", "logit", or "layers" of an evolved
            model; "" without a router.
        report: Content of the report.json of exactly these adapters; None if there is none.
    """

    kind: str
    base: Base
    specialists: tuple[Specialist, ...]
    router: str = ""
    mixture: str = ""
    report: Mapping[str, Any] | None = None

    @property
    def gates(self) -> dict[str, dict[str, float]]:
        """The router's mean gates on held-out text by domain and expert; empty if not recorded.

        A report comes from anywhere: what is no finite number is not recorded.
        """
        try:
            found = {
                clean(domain): {str(name): float(gate) for name, gate in gates.items()}
                for domain, gates in (self.report or {})["gates"][self.router].items()
            }
        except (AttributeError, LookupError, TypeError, ValueError):
            return {}
        whole = all(math.isfinite(gate) for gates in found.values() for gate in gates.values())
        return found if whole else {}


@dataclass(frozen=True)
class Weights:
    """How much of each specialist a merge or a request takes.

    Attributes:
        values: One for each specialist by name, in the subject's order.
        source: Where they come from, for people.
    """

    values: Mapping[str, float]
    source: str


def open_subject(
    folder: Path, *, base_folder: Path | None = None, plugins: Plugins | None = None
) -> Subject:
    """Open what a folder holds for export.

    Args:
        folder: As for `open_model`; a report beside a model, or beside its folder, is read too.
        base_folder: Where its base is; the recorded relative path if None.
        plugins: Where routers and adapter kinds are registered; the installed ones if None.

    Raises:
        MoloraError: Whatever loading it refuses.
    """
    model = open_model(folder, base_folder=base_folder, compute=_EXACT, plugins=plugins)
    specialists = tuple(_name_apart(_list_specialists(model, folder)))
    router, mixture = "", ""
    if isinstance(model, FusedModel):
        kind, router, mixture = "fused", model.router_name, model.mixture
    elif isinstance(model, EvolvedModel):
        kind, router, mixture = "evolved", model.router_name, "layers"
    else:
        kind = "base" if model.adapter is None else "specialist"
    report = _find_report(folder, specialists) if kind == "fused" else None
    return Subject(kind, model.base, specialists, router, mixture, report)


def _list_specialists(model: Model, folder: Path) -> Iterator[Specialist]:
    """What a model adds to its base; experts that are the base itself are left out."""
    if isinstance(model, FusedModel):
        for expert in model.experts:
            if expert.adapter is not None:
                yield Specialist(expert.name, expert.adapter, expert.domain)
    elif isinstance(model, EvolvedModel):
        for index, slot in enumerate(model.population.slots):
            yield Specialist(slot.birth.id, slot_adapter(model.population, index), slot.domain)
    elif isinstance(model, PlainModel) and model.adapter is not None:
        place = folder.resolve()
        name = place.parent.name if place.name == "adapter" else place.name
        yield Specialist(name, model.adapter)


def _name_apart(specialists: Iterator[Specialist]) -> Iterator[Specialist]:
    """Names that may be a file's on every system, no two of them alike."""
    taken = {BASE_EXPERT}
    for each in specialists:
        root = _OTHER.sub("-", each.name).strip("-_")[:_MAX_NAME] or "specialist"
        name, number = root, 2
        while name.lower() in taken:
            name, number = f"{root}-{number}", number + 1
        taken.add(name.lower())
        yield Specialist(name, each.adapter, each.domain)


def _find_report(folder: Path, specialists: tuple[Specialist, ...]) -> Mapping[str, Any] | None:
    """The report of exactly these adapters, beside the model or beside its folder."""
    for place in (folder, folder.resolve().parent):
        try:
            report = load_report(find_report(place))
        except ConfigError:
            continue
        prints = report["fingerprints"]
        hashes = prints.get("adapters") if isinstance(prints, Mapping) else None
        if hashes == {each.name: each.adapter.hash for each in specialists}:
            return report
    return None


def choose_weights(subject: Subject, text: str | None) -> Weights:
    """The weights that were asked for, or what is best founded.

    Args:
        subject: What is exported.
        text: NAME=NUMBER, separated by commas; specialists that are not named get 0. None takes
            the router's mean gates on held-out text, each domain counting the same; where no
            report has them, equal weights.

    Raises:
        ConfigError: If a name is unknown or comes twice, or a number is malformed or not finite.
    """
    names = [each.name for each in subject.specialists]
    if text is not None:
        given = _parse_weights(text, names)
        return Weights({name: given.get(name, 0.0) for name in names}, "as asked for")
    gates = list(subject.gates.values())
    if gates and all(name in each for each in gates for name in names):
        means = {name: sum(each[name] for each in gates) / len(gates) for name in names}
        source = (
            f"mean gates of the router {subject.router} on held-out text, each of "
            f"{len(gates)} domains counting the same; the base has the rest"
        )
        return Weights(means, source)
    equal = 1.0 / max(len(names), 1)
    return Weights(dict.fromkeys(names, equal), "equal: no report says what the gates were")


def _parse_weights(text: str, names: list[str]) -> dict[str, float]:
    known = [*names, BASE_EXPERT]  # the base changes nothing, whatever it weighs
    given: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        fault = (
            f"'{name}', which is none of them"
            if name not in known
            else f"'{name}' twice"
            if name in given
            else f"'{number}' for '{name}'"
            if not math.isfinite(value)
            else ""
        )
        if fault:
            raise ConfigError(
                f"Cannot use weights '{text}': expected NAME=NUMBER separated by commas, each of "
                f"{', '.join(names)} at most once and finite, got {fault}. Correct --weights."
            )
        given[name] = value
    if not any(given.get(name) for name in names):
        raise ConfigError(
            f"Cannot use weights '{text}': expected one that is not 0 at least, got none. "
            "Correct --weights."
        )
    return given
