"""A plugin used once on a real cooperative, in a folder of its own: nothing is written there."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from molora_cli.plugin_runs import (
    PLACES_IN_CASCADE,
    PLACES_IN_POPULATION,
    Tried,
    answer_with,
    evolve_with,
)
from molora_cli.progress import Reporter
from molora_fed.charter import Charter
from molora_fed.contributions.admission import AdmissionCandidate
from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.manifest import Contribution
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.errors import ConfigError, MoloraError
from molora_fed.guard import guarded
from molora_fed.models.base import Base
from molora_fed.plugins import Entry, Plugins
from molora_fed.storage.options import Choice, open_callable
from molora_fed.testing.findings import CheckResult, describe_raised
from molora_fed.types import Finding

__all__ = ["Trial"]

_Tried = Iterator[str]


class Trial:
    """What-ifs on one cooperative: everything that takes part in a fusion shares one.

    Args:
        cooperative: Read only.
        chosen: Hook's suffix and entry of all that is tried.
        plugins: Where they are registered.
        options: Of what is tried; only of one thing.
        progress: Receives phases and progress.
    """

    def __init__(
        self,
        cooperative: Cooperative,
        chosen: Sequence[tuple[str, Entry]],
        plugins: Plugins,
        options: Mapping[str, Any],
        progress: Reporter,
    ) -> None:
        self._cooperative = cooperative
        self._chosen = chosen
        self._plugins = plugins
        self._options = dict(options)
        self._progress = progress
        self._failure: Exception | None = None

    def run(self, suffix: str, entry: Entry) -> Iterator[CheckResult]:
        """Try one thing; a failure is a finding.

        Args:
            suffix: Of the hook.
            entry: What is tried.
        """
        name = f"on cooperative '{self._cooperative.charter.identity.name}'"
        trials: dict[str, Callable[[Entry], _Tried]] = {
            "routers": self._try_router,
            "merges": self._try_merge,
            "gain_predictors": self._try_predictor,
            "admission_checks": self._try_check,
            "domains": self._try_domain,
            "adapter_kinds": self._try_kind,
            **dict.fromkeys(PLACES_IN_POPULATION, partial(self._try_population, suffix)),
            **dict.fromkeys(PLACES_IN_CASCADE, partial(self._try_cascade, suffix)),
        }
        if suffix not in trials:
            yield CheckResult(name, None, "nothing of this kind is used on a cooperative alone")
            return
        try:
            said = list(trials[suffix](entry))
        except MoloraError as error:
            yield CheckResult(name, str(error))
            return
        except Exception as error:  # the others go on
            yield CheckResult(name, f"expected figures, got {describe_raised(error)}")
            return
        yield from (CheckResult(name, None, line) for line in said)

    @cached_property
    def _base(self) -> Base:
        self._progress.phase("base")
        return self._cooperative.load_base(self._progress)

    @cached_property
    def _contributions(self) -> tuple[Contribution, ...]:
        with self._cooperative.read_ledger() as ledger:
            found = tuple(load_admitted(ledger, self._cooperative.store))
        if not found:
            raise ConfigError(
                f"Cannot try anything on '{self._cooperative.folder}': expected admitted "
                "contributions, got none. Admit some with `molora coop admit`."
            )
        return found

    @cached_property
    def _fused(self) -> dict[str, Any]:
        """What a fusion with everything that is tried beside the published router measures."""
        if self._failure is not None:  # it would fail again for whoever asks next
            raise self._failure
        try:
            return self._fuse()
        except Exception as error:
            self._failure = error
            raise

    def _open_charter(self) -> Charter:
        """The charter of a cooperative whose texts lie here."""
        charter = self._cooperative.charter
        if charter.is_private:
            raise ConfigError(
                f"Cannot try this on '{self._cooperative.folder}': expected texts that lie here, "
                "got a charter under which they stay with contributors. Try it on another one."
            )
        return charter

    def _fuse(self) -> dict[str, Any]:
        from molora_fed.fusion.fuse import fuse

        charter = self._open_charter()
        rules = charter.amendment.fusion
        asked: dict[str, Any] = {
            key: [self._choose(entry) for suffix, entry in self._chosen if suffix == hook]
            for key, hook in (("compare", "routers"), ("merges", "merges"))
        }
        asked["compare"] = [one for one in asked["compare"] if one.key != rules.router]
        if self._options:  # every predictor is asked anyhow, with its defaults
            asked["predictors"] = [
                self._choose(entry) for suffix, entry in self._chosen if suffix == "gain_predictors"
            ]
        fusion = type(rules).model_validate({**rules.model_dump(), **asked})
        amended = charter.amendment.model_copy(update={"fusion": fusion})
        with tempfile.TemporaryDirectory(prefix="molora-") as scratch:
            kept = self._cooperative.folder / "bank"
            if kept.is_dir():  # a copy: columns that are missing are made in it
                shutil.copytree(kept, Path(scratch) / "bank")
            return fuse(
                self._base,
                charter.model_copy(update={"amendment": amended}),
                [collect_contributed(one) for one in self._contributions],
                Path(scratch),
                plugins=self._plugins,
                on_phase=self._progress.phase,
                progress=self._progress,
            ).result

    def _choose(self, entry: Entry) -> Choice:
        """What a charter would name to try it with its options, beside its own setting of it."""
        rules = self._cooperative.charter.amendment.fusion
        is_there = bool(self._options) and entry.name in (rules.router, rules.fallback)
        label = f"{entry.name}-tried" if is_there else ""
        return Choice(name=entry.name, label=label, options=self._options)

    def _loss(self, method: str) -> float:
        """Equal-weight held-out loss, nats per token."""
        return float(self._fused["equal_weight"][method]["point"])

    def _check_measured(self, entry: Entry) -> None:
        """Raise why a fusion has no figures for something."""
        why = self._fused["not_measured"].get(entry.kind, {}).get(self._choose(entry).key)
        if why is not None:
            raise ConfigError(str(why).removeprefix("failed: "))

    def _try_router(self, entry: Entry) -> _Tried:
        self._check_measured(entry)
        result, key = self._fused, self._choose(entry).key
        published = result["router"]
        gains = result["gain_percent"]
        for router in dict.fromkeys((key, published)):
            gain = gains[router]["vs_best_alone"]
            role = "" if router == key else ", published now"
            loss = self._loss(f"fused:{router}")
            yield (
                f"'{router}'{role}: {loss:.3f} nats a token on held-out text, {gain:+.2f} % "
                "against the best anyone has alone"
            )
        collapsed = result["guard"].get(key, {}).get("collapsed")
        if collapsed:
            yield f"the collapse guard finds it below the best expert on {', '.join(collapsed)}"

    def _try_merge(self, entry: Entry) -> _Tried:
        from molora_fed.fusion.boundary import label_merge

        self._check_measured(entry)
        result = self._fused
        published, label = result["router"], label_merge(self._choose(entry))
        yield (
            f"{self._loss(label):.3f} nats a token on held-out text; "
            f"{self._loss(f'fused:{published}'):.3f} of the router '{published}', "
            f"{result['best_alone']['loss']:.3f} of the best anyone has alone"
        )

    def _try_predictor(self, entry: Entry) -> _Tried:
        self._check_measured(entry)
        found = self._fused["forecasts"].get(entry.name)
        if found is None:
            yield "it gives no forecast of this cooperative"
            return
        interval = (
            f", {found['low']:+.2f} to {found['high']:+.2f} %"
            if found.get("low") is not None and found.get("high") is not None
            else ", no interval"
        )
        point = "no point" if found.get("point") is None else f"{found['point']:+.2f} %"
        measured = self._fused["gain_percent"][self._fused["router"]]
        gain = measured[f"vs_{found['reference']}"]
        yield f"forecast {point}{interval}; measured {gain:+.2f} % against {found['reference']}"

    def _try_check(self, entry: Entry) -> _Tried:
        check = open_callable(self._plugins.admission_checks, entry.name, self._options)
        for index, contribution in enumerate(self._contributions):
            candidate = AdmissionCandidate(
                contribution=contribution,
                charter=self._cooperative.charter,
                base=self._base,
                plugins=self._plugins,
                others=(*self._contributions[:index], *self._contributions[index + 1 :]),
                public_folder=self._cooperative.public_folder,
            )
            with guarded(entry, "admission"):
                found = check(candidate)
            who = contribution.manifest.contributor
            yield f"{who}: {_describe_finding(found)}"

    def _try_domain(self, entry: Entry) -> _Tried:
        from molora_fed.corpus.documents import open_domain

        documents, characters = 0, 0
        for document in open_domain(entry.name, self._plugins, self._options)():
            documents += 1
            characters += len(document.text)
            self._progress(documents, documents)
        asked = self._cooperative.charter.amendment.domains
        wanted = "" if not asked or entry.name in asked else "; its charter does not ask for it"
        yield f"{documents:,} documents of {characters:,} characters{wanted}"

    def _try_kind(self, entry: Entry) -> _Tried:
        """Written untrained: a format and a memory that suit the base."""
        from molora_fed.adapters.contract import open_kind
        from molora_fed.adapters.files import find_misfits, load_adapter

        charter = self._cooperative.charter
        rules = charter.identity.adapters
        rank = min(charter.amendment.training.rank, rules.max_rank)
        base = self._base.model
        with tempfile.TemporaryDirectory(prefix="molora-") as scratch, guarded(entry, "trial"):
            kind = open_kind(entry.name, self._options, self._plugins)
            folder = Path(scratch) / "adapter"
            trained, parameters = kind.prepare(base, rules, rank)
            kind.export(trained, base, folder, rank, rules)
            adapter = load_adapter(folder, model=base, plugins=self._plugins, name=entry.name)
            size = sum(path.stat().st_size for path in folder.iterdir())
        wrong = find_misfits(adapter, base)
        if wrong:
            raise ConfigError(f"expected an adapter that fits the base, got {'; '.join(wrong[:3])}")
        numbers = sum(parameter.numel() for parameter in parameters)
        accepted = "" if entry.name in rules.kinds else "; its charter does not accept the kind"
        yield f"{numbers:,} trained numbers, a folder of {size:,} bytes at rank {rank}{accepted}"

    def _try_population(self, suffix: str, entry: Entry) -> _Tried:
        charter, base = self._open_charter(), self._base
        what = Tried(suffix, entry.name, self._options, self._plugins, self._progress)
        yield from evolve_with(what, charter, base, self._contributions)

    def _try_cascade(self, suffix: str, entry: Entry) -> _Tried:
        contributors = [one.manifest.contributor for one in self._contributions]
        what = Tried(suffix, entry.name, self._options, self._plugins, self._progress)
        yield from answer_with(what, self._cooperative.folder, contributors)


def _describe_finding(found: Finding | None) -> str:
    if found is None:
        return "nothing"
    role = "only said: " if found.is_note else "a person looks at it: " if found.quarantine else ""
    return f"{role}expected {found.expected}, got {found.found}. {found.fix}"
