"""A match: one router fitted and measured on one arena, as a fusion fits and measures it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molora_fed.bank import HeldOutBank
from molora_fed.errors import ConfigError, MoloraError, StorageError
from molora_fed.evaluation.evaluate import Evaluation, evaluate
from molora_fed.forecasting.records import FAILED
from molora_fed.fusion.boundary import fit_watched, watch_bank
from molora_fed.fusion.collapse import GuardedRouter, fit_guarded
from molora_fed.fusion.plan import check_readings
from molora_fed.guard import guarded
from molora_fed.models.base import Base
from molora_fed.plugins import Entry, Plugins
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.storage.files import canonical_json, hash_bytes, write_json
from molora_fed.storage.settings import open_options
from molora_fed.types import Progress, Reading
from molora_studies.framework.results import hash_code_of
from molora_studies.tournament.arena import Arena, ArenaSource, TournamentSettings

__all__ = ["Player", "Tournament", "find_players", "hold_tournament"]

_VERSION = 1  # raise whenever a change here alters a match's figures
_STEPPED_TOKENS = 64
_STEPPED_TIMES = 5


@dataclass(frozen=True)
class Player:
    """A router that plays, or why it cannot.

    Attributes:
        entry: As it is registered.
        router: Its class; None if it cannot be used.
        options: Its defaults.
        readings: What it reads.
        failed: "failed: ..." if it cannot be used.
    """

    entry: Entry
    router: type[OutputRouter] | None = None
    options: RouterOptions | None = None
    readings: frozenset[Reading] = frozenset()
    failed: str | None = None

    @property
    def code(self) -> dict[str, str]:
        """SHA-256 of the code that makes its figures, by package."""
        names = ("molora_fed", str(getattr(self.router, "__module__", "")).partition(".")[0])
        return {name: hash_code_of(name) for name in dict.fromkeys(names) if name}


@dataclass(frozen=True, eq=False)
class Tournament:
    """What was played.

    Attributes:
        players: The routers, by name.
        arenas: As `Arena.describe`, in the order they were given.
        matches: Results; see `hold_tournament`.
    """

    players: tuple[Player, ...]
    arenas: tuple[Mapping[str, Any], ...]
    matches: tuple[Mapping[str, Any], ...]


def find_players(plugins: Plugins, names: tuple[str, ...]) -> tuple[Player, ...]:
    """Routers with their default options; what fails already is no reason to stop.

    Args:
        plugins: Where they are registered.
        names: Their names.

    Raises:
        UnknownNameError: If nobody registers one.
    """
    return tuple(_find_player(plugins, name) for name in names)


def _find_player(plugins: Plugins, name: str) -> Player:
    entry = plugins.routers.entry(name)
    try:
        router, options = open_options(
            plugins.routers,
            name,
            {},
            error=ConfigError,
            fix="Give its options defaults: a tournament knows no others.",
        )
        readings = check_readings(entry, router, options)
    except StorageError:
        raise
    except MoloraError as error:
        return Player(entry, failed=f"{FAILED}{error}")
    return Player(entry, router, options, readings)


def hold_tournament(
    settings: TournamentSettings,
    sources: list[ArenaSource],
    *,
    on_arena: Callable[[str], None] = lambda name: None,
    progress: Progress | None = None,
) -> Tournament:
    """Play every router on every arena; finished matches are kept and not played again.

    A match has `router`, `cooperative`, `training`, and either `failed`, or `causal` and

    - `loss_nats`, equal weight over domains, `losses_nats` by domain, `oracle_gap_nats`;
    - `worst_domain`: the `domain` that lies highest above its best expert, and by how many `nats`;
    - `worst_document_nats`: the most a document's part cost above its best expert, summed;
    - `unseen_nats`: loss less the base's on text that nobody trained on, equal weight over its
      domains, and `unseen_by_domain_nats`; None without such text;
    - `collapsed`: domains lost on calibration text after all refits, and `attempts`;
    - `seconds` of processor time, which other work on the machine changes little: `fit`, under the
      collapse guard; `step` and `base` of a token at batch 1 (`step` is None of a router that
      cannot decode).

    Args:
        settings: Who plays, and where it is kept.
        sources: The arenas.
        on_arena: Told the arena that is opened.
        progress: Receives matches done and in all on the arena, or blocks while banks are built.

    Raises:
        MoloraError: If an arena cannot be opened; a router that fails is a match that failed.
    """
    players = find_players(settings.plugins, settings.routers)
    arenas: list[Mapping[str, Any]] = []
    matches: list[Mapping[str, Any]] = []
    for source in sources:
        on_arena(f"{source.cooperative}, {source.training}")
        arena = source.open(settings)
        arenas.append(arena.describe())
        matches += _play_all(settings, arena, players, progress)
    return Tournament(players, tuple(arenas), tuple(matches))


def _play_all(
    settings: TournamentSettings,
    arena: Arena,
    players: tuple[Player, ...],
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    left = {p.entry.name: p for p in players if p.failed is None}
    files = {name: _name_file(settings, arena, player) for name, player in left.items()}
    todo = {name for name, file in files.items() if not file.is_file()}
    # One build with what all of them read: an expert's columns are made in one pass.
    readings: frozenset[Reading] = frozenset().union(
        {"evidence"}, *(left[name].readings for name in todo)
    )
    if todo:
        arena.open_calibration(readings, progress)
        arena.open_held_out(readings, progress)
        if arena.has_unseen:
            arena.open_unseen(readings, progress)
    for done, player in enumerate(players):
        name = player.entry.name
        if progress is not None:
            progress(done, len(players), router=name)
        if player.failed is not None:
            found: dict[str, Any] = {"failed": player.failed}
        elif name in todo:
            found = _play(arena, player, readings)
            if found["failed"] is None:  # what failed is played again: it may have been mended
                write_json(files[name], found)
        else:
            found = json.loads(files[name].read_bytes())
        yield {
            "router": name,
            "cooperative": arena.cooperative,
            "training": arena.training,
            **found,
        }
    if progress is not None:
        progress(len(players), len(players))


def _name_file(settings: TournamentSettings, arena: Arena, player: Player) -> Path:
    assert player.options is not None  # a player that failed has no file
    decides = {
        "version": _VERSION,
        "arena": arena.key,
        "router": player.entry.name,
        "options": player.options.model_dump(mode="json"),
        "code": player.code,
    }
    return settings.folder / "matches" / f"{hash_bytes(canonical_json(decides))}.json"


def _play(arena: Arena, player: Player, readings: frozenset[Reading]) -> dict[str, Any]:
    try:
        return _measure(arena, player, readings)
    except StorageError:
        raise
    except MoloraError as error:
        return {"failed": f"{FAILED}{error}"}


def _measure(arena: Arena, player: Player, readings: frozenset[Reading]) -> dict[str, Any]:
    entry, router = player.entry, player.router
    assert router is not None and player.options is not None
    # Opened anew for every router: nobody profits from numbers that another one derived.
    bank = arena.open_calibration(readings)
    clock: dict[str, float] = {}
    fit = _timed(
        partial(fit_guarded, router, bank, player.options, arena.seed, **arena.guard), clock
    )
    found = fit_watched(entry, bank, fit)
    held_out = arena.open_held_out(readings)
    name = entry.name
    evaluation = _evaluate(entry, held_out, found.router)
    losses, oracle = evaluation.losses(f"fused:{name}"), evaluation.losses("domain_oracle")
    above = {domain: losses[domain] - oracle[domain] for domain in losses}
    worst = max(above, key=lambda domain: above[domain])
    unseen: dict[str, float] | None = None
    if arena.has_unseen:
        foreign = _evaluate(entry, arena.open_unseen(readings), found.router)
        fused, base = foreign.losses(f"fused:{name}"), foreign.losses("base")
        unseen = {domain: fused[domain] - base[domain] for domain in fused}
    excess = evaluation.excess[name]
    loss = evaluation.equal_weight(f"fused:{name}")
    return {
        "failed": None,
        "causal": found.router.causal,
        "loss_nats": loss,
        "losses_nats": losses,
        "oracle_gap_nats": loss - evaluation.equal_weight("domain_oracle"),
        "worst_domain": {"domain": worst, "nats": above[worst]},
        "worst_document_nats": float(excess.max()) if len(excess) else None,
        "unseen_nats": None if unseen is None else sum(unseen.values()) / len(unseen),
        "unseen_by_domain_nats": unseen,
        "collapsed": list(found.collapsed),
        "attempts": len(found.attempts),
        "seconds": {
            **clock,
            "step": _time_step(entry, found.router, held_out),
            "base": _time_base(arena.base, held_out),
        },
    }


def _evaluate(entry: Entry, bank: HeldOutBank, router: OutputRouter) -> Evaluation:
    return evaluate(
        bank, {entry.name: router}, watch=lambda name: watch_bank(entry, bank, "evaluation")
    )


def _timed(
    fit: Callable[[], GuardedRouter[Any]], clock: dict[str, float]
) -> Callable[[], GuardedRouter[Any]]:
    """The same fit; its seconds go into `clock`, without the probes that follow it."""

    def run() -> GuardedRouter[Any]:
        start = time.process_time()
        found = fit()
        clock["fit"] = time.process_time() - start
        return found

    return run


def _time_step(entry: Entry, router: OutputRouter, bank: HeldOutBank) -> float | None:
    """Seconds of a token's `step` at batch 1, the least of a few runs; None if it cannot."""
    if not router.causal:
        return None
    view = bank.view(slice(0, 1))
    tokens = min(_STEPPED_TOKENS, bank.block_size)

    def run() -> None:
        state = router.init_state(1)
        for token in range(tokens):
            _, state = router.step(view.at(token, token + 1), state)

    with guarded(entry, "step"):
        return _time_least(run) / tokens


def _time_base(base: Base, bank: HeldOutBank) -> float:
    """Seconds of the base's own pass over a token at batch 1 with a cache, in the same process."""
    tokens = bank.tokens[:1, : min(_STEPPED_TOKENS, bank.block_size)].long().to(bank.device)

    def run() -> None:
        cache = None
        for token in range(tokens.shape[1]):
            passed = base.model(tokens[:, token : token + 1], past_key_values=cache, use_cache=True)
            cache = passed.past_key_values

    return _time_least(run) / tokens.shape[1]


def _time_least(run: Callable[[], None]) -> float:
    seconds = []
    with torch.inference_mode():
        for _ in range(_STEPPED_TIMES):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    return min(seconds)
