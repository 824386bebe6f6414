"""Where arenas come from: cooperatives of this machine, and specialists of studies."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from molora_fed.adapters.carried_files import CarriedFiles, load_carried
from molora_fed.adapters.files import load_adapter
from molora_fed.bank import Expert
from molora_fed.charter import CorpusRules, FusionRules, TrainingRules
from molora_fed.contributions.carried import CarriedContext, compute_carried
from molora_fed.contributions.contributed import Contributed, collect_contributed
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative, open_cooperative
from molora_fed.cooperative.known_text import read_known_text
from molora_fed.errors import ConfigError, PluginError, StudyError
from molora_fed.fusion.held_out import compare_held_out
from molora_fed.fusion.plan import BASE_EXPERT
from molora_fed.models.batches import fit_batch
from molora_fed.storage.files import canonical_json, hash_bytes, make_folder, write_bytes
from molora_fed.storage.options import Choice
from molora_fed.types import Split
from molora_studies.framework.contract import Cell, Task
from molora_studies.framework.fusions import Fusion, leave_out_baselines, open_fusion
from molora_studies.framework.results import PlannedStudy, hash_code_of
from molora_studies.framework.store import TaskStore
from molora_studies.tournament.arena import (
    Arena,
    ArenaSource,
    TournamentSettings,
    compare_text,
    link_columns,
    read_unseen,
)

__all__ = ["find_cooperative", "list_study_arenas"]

_MAX_CARRIED_BYTES = FusionRules().max_carried_bytes


def find_cooperative(folder: Path) -> ArenaSource:
    """The arena of a cooperative whose admitted contributions and their samples are here.

    Args:
        folder: The coordinator's home. Cooperatives of one name are trainings of one.

    Raises:
        CharterError: If the charter cannot be read.
        ConfigError: If texts stay with their contributors.
    """
    cooperative = open_cooperative(folder)
    if cooperative.charter.is_private:
        raise ConfigError(
            f"Cannot hold a tournament in '{folder}': expected texts that lie here, got a charter "
            "under which they stay with contributors. Take a cooperative of privacy mode 'pooled'."
        )
    name = cooperative.charter.identity.name
    return ArenaSource(name, str(folder), partial(_open_cooperative, cooperative, str(folder)))


def _open_cooperative(
    cooperative: Cooperative, training: str, settings: TournamentSettings
) -> Arena:
    """Admitted contributions with their samples, in canonical order, as `molora fuse` takes them.

    Raises:
        ConfigError: If there are none, or one has no calibration blocks.
    """
    charter = cooperative.charter
    contributed = _collect(cooperative)
    base = cooperative.load_base()
    rules, fusion = charter.identity.adapters, charter.amendment.fusion
    unseen = read_unseen(
        settings, base, charter.identity.corpus, [one.domain for one in contributed]
    )
    # As contributions that bring held-out blocks alone: compared with all that others trained on.
    strangers = [
        Contributed(
            id=part.domain,
            contributor=f"unseen {part.domain}",
            domain=part.domain,
            adapter=Path(),
            held_out=part,
        )
        for part in unseen.blocks
    ]
    choice = compare_held_out([*contributed, *strangers], base)
    experts = [
        Expert(
            one.contributor,
            partial(
                load_adapter,
                one.adapter,
                rules=rules,
                model=base.model,
                plugins=settings.plugins,
                name=one.contributor,
            ),
            one.carried,
        )
        for one in contributed
    ]
    corpus = charter.identity.corpus
    arena = Arena(
        cooperative=charter.identity.name,
        training=training,
        base=base,
        experts=(Expert(BASE_EXPERT, None), *experts),
        calibration=tuple(one.calibration for one in contributed if one.calibration),
        held_out=tuple(one.held_out for one in contributed),
        unseen=unseen,
        overlaps=tuple(choice.overlaps.values()),
        bank={
            "mixture": fusion.mixture,
            "batch": fit_batch(base.model, corpus.block_size, corpus.evaluation_batch),
            "frozen_depth": rules.frozen_depth,
        },
        guard={"collapse_nats": fusion.collapse_nats, "restarts": fusion.restarts},
        seed=charter.amendment.seed,
        folder=_name_folder(settings, "cooperative", charter.identity_hash, training),
    )
    link_columns(cooperative.folder / "bank", arena.folder)
    return arena


def _collect(cooperative: Cooperative) -> list[Contributed]:
    texts = read_known_text(cooperative.folder)
    with cooperative.read_ledger() as ledger:
        admitted = load_admitted(ledger, cooperative.store)
    found = [
        collect_contributed(one, corpus=texts.get(one.manifest.contributor)) for one in admitted
    ]
    bare = [one.contributor for one in found if not one.calibration]
    if bare or not found:
        raise ConfigError(
            f"Cannot hold a tournament in '{cooperative.folder}': expected admitted contributions "
            f"with calibration blocks, got {'none of ' + ', '.join(bare) if bare else 'none'}. "
            "Run `molora fuse` first, under a charter that asks for calibration blocks."
        )
    return found


def list_study_arenas(planned: PlannedStudy) -> list[ArenaSource]:
    """Arenas of a study's fusions, for each cooperative that was trained at least twice.

    Taken are fusions as this project fuses: a probability mixture with the base as an expert. Its
    specialists must be trained; the fusion, and models that it compares, may be missing.

    Args:
        planned: The study.

    Raises:
        StudyError: If it has no such fusion, or a specialist of one is not trained.
    """
    store = TaskStore.in_cache(planned.cache)
    groups: dict[str, list[Cell]] = {}
    for cell in planned.cells:
        if "seed" in cell.labels and _is_arena(cell.task):
            name = cell.name.removesuffix(f" seed {cell.labels['seed']}")
            groups.setdefault(name, []).append(cell)
    replicated = {name: cells for name, cells in groups.items() if len(cells) > 1}
    if not replicated:
        raise StudyError(
            f"Cannot hold a tournament on study '{planned.name}': expected fusions of several "
            "seeds by probability mixture with the base as an expert, got none. Choose another."
        )
    rests_on = {
        need.key: need
        for cells in replicated.values()
        for cell in cells
        for need in leave_out_baselines(cell.task)[1]
    }
    missing = [need.name for need in rests_on.values() if not store.is_done(need)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise StudyError(
            f"Cannot hold a tournament on study '{planned.name}': expected trained specialists, "
            f"got nothing of '{missing[0]}'{more}. Run `molora study {planned.name}` first."
        )
    found = []
    for name, cells in replicated.items():
        cooperative = planned.name if len(replicated) == 1 else f"{planned.name} {name}"
        for cell in cells:
            training = f"seed {cell.labels['seed']}"
            opening = partial(_open_fusion, cooperative, training, store, cell.task)
            found.append(ArenaSource(cooperative, training, opening))
    return found


def _is_arena(task: Task) -> bool:
    if task.action != "fuse-members":
        return False
    fusion = task.settings["fusion"]
    return fusion["mixture"] == "probability" and fusion["base_expert"]


def _open_fusion(
    cooperative: str, training: str, store: TaskStore, task: Task, settings: TournamentSettings
) -> Arena:
    fused, folder = store.folder(task), _name_folder(settings, "fusion", task.key)
    alone, needs = leave_out_baselines(task)
    fusion = open_fusion(alone, [store.read(need)[0] for need in needs], fused)
    held_out = fusion.take(Split.HELD_OUT, fusion.settings.held_out)
    rules = CorpusRules(block_size=held_out[0].block_size)
    unseen = read_unseen(settings, fusion.base, rules, [part.domain for part in held_out])
    overlaps = compare_text(held_out, unseen, fusion.list_known(), fusion.base.tokenizer)
    link_columns(fused / "bank", folder)
    return Arena(
        cooperative=cooperative,
        training=training,
        base=fusion.base,
        experts=tuple(_carry(fusion, folder / "carried", settings)),
        calibration=tuple(fusion.take(Split.CALIBRATION, fusion.settings.calibration)),
        held_out=tuple(held_out),
        unseen=unseen,
        overlaps=overlaps,
        bank={"mixture": "probability", "frozen_depth": fusion.frozen_depth},
        guard={"restarts": 3},
        seed=fusion.settings.seed,
        folder=folder,
    )


def _carry(fusion: Fusion, folder: Path, settings: TournamentSettings) -> Iterator[Expert]:
    """The experts with what registered plugins compute for a contribution, each of its own text.

    A study's specialists were trained before anybody asked for it. It is computed once and kept; an
    expert for which a plugin fails carries nothing of it.
    """
    registry = settings.plugins.carried_files
    corpora = dict(zip(fusion.members, fusion.corpora, strict=False))
    for expert in fusion.list_experts():
        adapter, corpus = expert.load(), corpora.get(expert.name)
        if adapter is None or corpus is None:
            yield expert
            continue
        context = CarriedContext(
            base=fusion.base,
            adapter=adapter,
            rules=TrainingRules(),
            seed=fusion.settings.seed,
            max_bytes=_MAX_CARRIED_BYTES,
            samples=corpus.blocks,
        )
        files = {}
        for entry in registry:
            made_by = hash_code_of(str(entry.target).partition(".")[0])[:16]
            path = folder / f"{entry.name}-{made_by}" / f"{expert.name}.safetensors"
            if not path.exists():
                try:
                    choice = Choice(name=entry.name)
                    data = compute_carried(choice, context, settings.plugins)
                except PluginError:
                    continue
                make_folder(path.parent)
                write_bytes(path, data)
            files[entry.name] = partial(
                load_carried, path, entry.name, who=expert.name, max_bytes=_MAX_CARRIED_BYTES
            )
        yield replace(expert, carried=CarriedFiles(files))


def _name_folder(settings: TournamentSettings, *parts: str) -> Path:
    return settings.folder / "banks" / hash_bytes(canonical_json(list(parts)))[:32]
