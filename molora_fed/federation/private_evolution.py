"""The coordinator's worker evolves a population on texts that stay with their contributors."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora_fed.charter import Charter
from molora_fed.contributions.manifest import Contribution
from molora_fed.federation.homes import ContributorBox, CoordinatorHome
from molora_fed.federation.mailbox import read_json
from molora_fed.plugins import Plugins
from molora_fed.storage.files import canonical_json, hash_bytes, write_json
from molora_fed.storage.keys import key_fingerprint
from molora_fed.types import Progress

if TYPE_CHECKING:
    from molora_fed.models.base import Base
    from molora_fed.population.questions import Ask

__all__ = ["EVOLVED_FOLDER", "claim_folder", "evolve_privately", "find_boxes"]

EVOLVED_FOLDER = "evolved"
RESULT_FILE = "evolution.json"
_RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class _Entrant:
    """A contribution, as an evolution needs it; see `Entrant`."""

    id: str
    contributor: str
    domain: str
    adapter: Path


def find_boxes(
    home: CoordinatorHome, contributions: Sequence[Contribution]
) -> dict[str, ContributorBox]:
    """Mailbox of each contributor by name, in the order of the contributions."""
    return {
        one.manifest.contributor: home.contributor(key_fingerprint(one.manifest.public_key))
        for one in contributions
    }


def claim_folder(home: CoordinatorHome, charter: Charter, ids: Sequence[str]) -> None:
    """Delete the evolution of other contributions, or of another amendment.

    What was published is not sent to anyone any more, so that whoever joins again takes part.

    Raises:
        StorageError: If the disk refuses.
    """
    recipe = {
        "contributions": list(ids),
        "charter": hash_bytes(canonical_json(charter.model_dump(mode="json"))),
    }
    path = home.evolution / _RECIPE_FILE
    if read_json(path) != recipe:
        (home.outbox / "result.json").unlink(missing_ok=True)
        shutil.rmtree(home.evolution, ignore_errors=True)
        write_json(path, recipe)


def evolve_privately(
    base: "Base",
    charter: Charter,
    contributions: Sequence[Contribution],
    ask: "Ask",
    folder: Path,
    *,
    plugins: Plugins,
    on_phase: Callable[[str], None],
    progress: Progress,
) -> Mapping[str, Any]:
    """Evolve, or go on; measure on held-out texts, once; write the evolved model.

    Args:
        base: The charter's base.
        charter: Decides slots, router, fitness, lifecycle and guard.
        contributions: Admitted ones, in canonical order.
        ask: Asks their contributors.
        folder: Gets the evolution's files, `evolved/` and `evolution.json`.
        plugins: Where everything is registered.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Returns:
        Content of `evolution.json`.

    Raises:
        PopulationError: If the rules cannot be used.
        MoloraError: Whatever the disk refuses.
    """
    from molora_fed.population.bundle import save_evolved
    from molora_fed.population.generations import evolve
    from molora_fed.population.lifecycle import open_operators
    from molora_fed.population.private import Member, PrivateData
    from molora_fed.population.private_evaluation import evaluate_privately
    from molora_fed.population.setup import build_config, build_result, build_start

    rules = charter.amendment.population
    entrants = [
        _Entrant(one.id, one.manifest.contributor, one.manifest.domain, one.adapter_folder)
        for one in contributions
    ]
    steps = open_operators([(one.name, one.options) for one in rules.lifecycle], plugins)
    start = build_start(base, charter, entrants, plugins)
    data = PrivateData(
        [Member(one.id, one.contributor, one.domain) for one in entrants],
        ask,
        scope=rules.scope,
        rounds=rules.rounds,
        router_name=rules.router,
        plugins=plugins,
    )
    config = build_config(rules, len(data.domains), seed=charter.amendment.seed, threads=1)
    evolved = evolve(
        start, data, steps, config, folder, plugins=plugins, on_phase=on_phase, progress=progress
    )
    on_phase("held-out")
    last = evolved.generations[-1]
    measured = evaluate_privately(
        data,
        evolved.branch,
        start,
        [one.contributor for one in entrants],
        router_name=rules.router,
        gates={d: dict(zip(last.slots, row, strict=True)) for d, row in last.gates.items()},
    )
    save_evolved(base, evolved.branch, rules.router, folder / EVOLVED_FOLDER)
    result = build_result(charter, entrants, evolved, data.domains, measured)
    write_json(folder / RESULT_FILE, result)
    return result
