"""The demo: a whole cooperative on this machine, as it is deployed, in a few minutes.

It creates a cooperative, runs its server and one contributor a domain as processes of their own
on loopback, and adds to their result what only this machine knows: training curves, corpora,
generated samples, and the time of each phase.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from molora_fed.charter import (
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
)
from molora_fed.cooperative.contribute import prepare_domain
from molora_fed.cooperative.controls import CONTROLS, PooledTraining
from molora_fed.cooperative.cooperative import CharterAndBase, Cooperative
from molora_fed.cooperative.create import BUILTIN_SOURCE, found_cooperative
from molora_fed.corpus.builtin import DEFAULT_DOMAINS
from molora_fed.demo.report import complete_result, generate_samples, write_demo_report
from molora_fed.errors import ConfigError
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.local import LocalContributor, note_known_text, run_local
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.status import FederationEvent
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.reporting.methods import BUDGET_SECONDS
from molora_fed.storage.compute import Compute
from molora_fed.storage.files import write_json
from molora_fed.storage.values import count_cores
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "DemoListener",
    "DemoOptions",
    "DemoResult",
    "PhaseClock",
    "plan_contributors",
    "run_demo",
]


COOPERATIVE_NAME = "demo"
SECONDS_FILE = "seconds.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class DemoOptions:
    """What a demo does.

    Attributes:
        domains: Registered domains; the built-in four if there are neither domains nor data.
        data: Files and folders of the user's own text by domain.
        contributors: Number of contributors; one a domain if None.
        steps: Training steps of a specialist at most; the charter's default if None.
        kind: Adapter kind; the charter's default if None.
        seed: Of base, specialists, routers, bootstraps and samples.
        out: Gets `cooperative/`, `contributors/` and `report/`.
        control: Whether an adapter and the whole base are also trained on everybody's text pooled,
            for as many steps, to compare with.
        command: The command that was run, for the report.
        base: "builtin", ID@REVISION, or a folder.
        base_steps: Training steps of the built-in base; its default if None.
        cache: Folder in which built-in bases are kept for other runs.
        cores: Cores the workers share; all this process may use if None.
        samples: Blocks each contributor sends; the charter's default if None.
        corpus: How text becomes blocks; the charter's default if None.
        compute: Where all models run, and in which dtype.
        privacy: What leaves contributors beside adapters.
    """

    domains: tuple[str, ...] = ()
    data: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    contributors: int | None = None
    steps: int | None = None
    kind: str | None = None
    seed: int = 42
    out: Path = Path("demo")
    control: bool = False
    command: str = ""
    base: str = BUILTIN_SOURCE
    base_steps: int | None = None
    cache: Path | None = None
    cores: int | None = None
    samples: SampleRules | None = None
    corpus: CorpusRules | None = None
    compute: Compute = field(default_factory=Compute)
    privacy: PrivacyRules = field(default_factory=PrivacyRules)


class DemoListener(Protocol):
    """Shows what a demo does while it does it."""

    def phase(self, name: str) -> None:
        """Begin a phase outside the federation."""

    def progress(self, done: int, total: int, **fields: float | str) -> None:
        """Report progress within it; see `molora_fed.types.Progress`."""

    def event(self, event: FederationEvent) -> None:
        """Take in what a server or a contributor reports."""


class _Quiet:
    """Shows nothing."""

    def phase(self, name: str) -> None:
        """Begin a phase."""

    def progress(self, done: int, total: int, **fields: float | str) -> None:
        """Report progress."""

    def event(self, event: FederationEvent) -> None:
        """Take in an event."""


@dataclass(frozen=True)
class DemoResult:
    """What a demo leaves.

    Attributes:
        result: Content of report.json.
        report: Path of report.html.
        fused: Folder of the fused model.
        seconds: Wall-clock seconds by phase, writing the report included.
    """

    result: dict[str, Any]
    report: Path
    fused: Path
    seconds: dict[str, float]


def plan_contributors(options: DemoOptions, plugins: Plugins) -> list[LocalContributor]:
    """Who takes part: contributors dealt to the domains in turn, the cores shared among them.

    Raises:
        ConfigError: If there are fewer contributors than domains, or a domain comes twice.
        UnknownNameError: If nobody registers a domain.
    """
    domains = options.domains or (() if options.data else DEFAULT_DOMAINS)
    for domain in domains:
        plugins.domains.entry(domain)
    twice = sorted(set(domains) & set(options.data))
    if twice:
        raise ConfigError(
            f"Cannot run the demo: expected each domain once, got {', '.join(twice)} as a "
            "registered domain and with data. Give one of them another name."
        )
    names = [*domains, *options.data]
    count = len(names) if options.contributors is None else options.contributors
    if count < max(2, len(names)):
        raise ConfigError(
            f"Cannot run the demo: expected at least {max(2, len(names))} contributors, two in "
            f"all and one a domain ({', '.join(names)}), got {count}. Raise --contributors, or "
            "change --domains."
        )
    threads = max(1, (options.cores or count_cores()) // count)
    planned = []
    for index in range(count):
        domain = names[index % len(names)]
        shares = (count - index % len(names) - 1) // len(names) + 1
        share = index // len(names)
        name = domain if shares == 1 else f"{domain}-{share + 1}"
        planned.append(
            LocalContributor(
                options.out / "contributors" / name,
                JoinSettings(
                    name,
                    domain,
                    data=tuple(options.data.get(domain, ())),
                    shard=(share, shares),
                    threads=threads,
                    compute=options.compute,
                ),
            )
        )
    return planned


def run_demo(
    options: DemoOptions,
    listener: DemoListener | None = None,
    *,
    plugins: Plugins | None = None,
) -> DemoResult:
    """Run a whole cooperative on this machine; safe to interrupt, run again to resume.

    Args:
        options: What to do.
        listener: Shows what happens.
        plugins: What is registered; the installed plugins by default. Workers use the installed.

    Returns:
        The result with the paths of report and fused model.

    Raises:
        ConfigError: If the options contradict each other.
        MoloraError: The first error of server or contributors.
    """
    if options.control and options.privacy.mode != "pooled":
        raise ConfigError(
            f"Cannot run the demo with --control: expected --privacy pooled, for it trains on "
            f"everybody's text, got '{options.privacy.mode}'. Leave one of them out."
        )
    shown, registered = listener or _Quiet(), plugins or get_plugins()
    contributors = plan_contributors(options, registered)
    least = options.privacy.min_members
    if len(contributors) < least:
        raise ConfigError(
            f"Cannot run the demo: expected {least} contributors or more, for no masked total of "
            f"fewer is opened, got {len(contributors)}. Raise --contributors, add --data, or pass "
            "--summing robust or --privacy pooled."
        )
    cores = options.cores or count_cores()
    clock = PhaseClock(member.settings.name for member in contributors)

    def enter(phase: str) -> None:
        clock.enter(phase)
        shown.phase(phase)

    def observe(event: FederationEvent) -> None:
        clock.observe(event)
        shown.event(event)

    try:
        enter("base")
        cooperative, base = _create(options, contributors, registered, shown.progress)
        note_known_text(cooperative.folder, contributors)
        if options.control:
            _train_controls(cooperative, base, contributors, cores, registered, shown, enter)
        clock.enter("starting")
        run_local(cooperative.folder, contributors, observe, threads=cores, compute=options.compute)
        enter("samples")
        samples = generate_samples(cooperative, contributors, seed=options.seed)
    finally:
        clock.enter("")
        seconds = _add_earlier(options.out, clock.seconds)
    enter("report")
    result = json.loads((cooperative.folder / RESULT_FILE).read_text(encoding="utf-8"))
    completed = complete_result(
        result,
        cooperative,
        contributors,
        samples=samples,
        seconds={name: seconds[name] for name in seconds if name != "report"},
        command=options.command,
    )
    report = write_demo_report(completed, contributors, options.out / "report")
    clock.enter("")
    return DemoResult(
        completed,
        report,
        cooperative.folder / "fused",
        {**completed["seconds"], "report": clock.seconds["report"]},
    )


def _create(
    options: DemoOptions,
    contributors: Sequence[LocalContributor],
    plugins: Plugins,
    progress: Progress,
) -> "tuple[Cooperative, Base]":
    training = TrainingRules()
    changes = {"steps": options.steps, "kind": options.kind}
    training = training.model_copy(update={k: v for k, v in changes.items() if v is not None})
    amendment = Amendment(
        domains=tuple(sorted({member.settings.domain for member in contributors})),
        expected=len(contributors),
        seed=options.seed,
        training=training,
        samples=options.samples or SampleRules(),
        fusion=FusionRules(router=options.privacy.router, compare=options.privacy.comparisons),
    )
    return found_cooperative(
        options.out / "cooperative",
        COOPERATIVE_NAME,
        source=options.base,
        corpus=options.corpus,
        amendment=amendment,
        privacy=options.privacy,
        base_steps=options.base_steps,
        cache=options.cache,
        plugins=plugins,
        progress=progress,
    )


def _add_earlier(out: Path, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase, those of runs that were stopped before included; kept for the next."""
    earlier = read_json(out / SECONDS_FILE) or {}
    names = {*seconds, *earlier}
    total = {name: seconds.get(name, 0.0) + float(earlier.get(name, 0.0)) for name in names}
    write_json(out / SECONDS_FILE, total)
    return total


def _train_controls(
    cooperative: Cooperative,
    base: "Base",
    contributors: Sequence[LocalContributor],
    threads: int,
    plugins: Plugins,
    listener: DemoListener,
    enter: Callable[[str], None],
) -> None:
    """Train the controls before anyone contributes, where the coordinator looks for them."""
    under = CharterAndBase(cooperative.charter, base)
    corpora = [
        prepare_domain(
            under,
            member.settings.domain,
            member.settings.data,
            cooperative.folder / "control" / "text" / member.settings.name,
            shard=member.settings.shard,
            plugins=plugins,
        )
        for member in contributors
    ]
    pooled = PooledTraining(
        folder=cooperative.folder,
        charter=cooperative.charter,
        base=base,
        corpora=corpora,
        contributors=len(contributors),
        threads=threads,
        plugins=plugins,
    )
    for name in CONTROLS:
        enter(name)
        pooled.train(name, listener.progress)


_ORDER = ("JOINING", "CORPUS", "TRAINING", "SUBMITTING", "SUBMITTED", "ADMITTED", "DONE")
_SLOWEST = ("starting", "corpus", "training", "admission")
"""The phase while the slowest contributor is at this place of the order."""


class PhaseClock:
    """Measures wall-clock time by phase; contributors work side by side, the slowest counts.

    Args:
        contributors: Names of all that take part.
    """

    def __init__(self, contributors: Iterable[str] = ()) -> None:
        self._places = dict.fromkeys(contributors, 0)
        self._server_phase = ""
        self._server_message = ""
        self._since = time.monotonic()
        self.phase = ""
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Begin a phase; the time since the last one counts for that. Empty ends the last."""
        now = time.monotonic()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self._since, self.phase = now, phase

    def observe(self, event: FederationEvent) -> None:
        """Take in what a server or a contributor reports."""
        if event.contributor:
            if event.contributor in self._places and event.phase in _ORDER:
                place = _ORDER.index(event.phase)
                self._places[event.contributor] = max(place, self._places[event.contributor])
        elif not event.problem:
            self._server_phase, self._server_message = event.phase, event.message
        phase = self._find()
        if phase != self.phase:
            self.enter(phase)

    def _find(self) -> str:
        is_fusing = self._server_phase in ("FUSING", "GROWING")
        begun = self._server_message.partition(",")[0]  # what follows is who is asked for what
        if is_fusing and begun in BUDGET_SECONDS:
            return begun
        if self._server_phase == "PUBLISHED":
            return "delivery"
        if is_fusing or self._server_phase == "STOPPED":
            return self.phase
        slowest = min(self._places.values(), default=0)
        return _SLOWEST[min(slowest, len(_SLOWEST) - 1)]
