"""The fusion of a study's members, measured as every fusion is; an action of the substrate."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.bank import CalibrationBank, Expert, HeldOutBank
from molora_fed.bank import build_calibration_bank as build_calibration
from molora_fed.bank import build_held_out_bank as build_held_out
from molora_fed.corpus.blocks import Blocks
from molora_fed.corpus.overlap import (
    KnownText,
    Overlap,
    index_blocks,
    measure_overlap,
    summarise_overlap,
)
from molora_fed.corpus.prepare import Corpus
from molora_fed.errors import ConfigError
from molora_fed.evaluation.bootstrap import ClusterIndex
from molora_fed.evaluation.evaluate import Evaluation, evaluate
from molora_fed.forecasting.divergence import compute_gains
from molora_fed.fusion.collapse import GuardedRouter, fit_guarded
from molora_fed.fusion.plan import BASE_EXPERT
from molora_fed.fusion.texts import measure_loss_matrix
from molora_fed.models.base import Base
from molora_fed.plugins import get_plugins
from molora_fed.routing.contract import OutputRouter, RouterOptions
from molora_fed.routing.top_k import limit_experts
from molora_fed.storage.files import write_bytes, write_json
from molora_fed.storage.options import open_callable
from molora_fed.types import LossMatrix, Reading, Split
from molora_studies.framework.actions import open_base, open_corpus
from molora_studies.framework.contract import Done, Task, TaskContext
from molora_studies.framework.substrate import FusionSettings

__all__ = [
    "Fusion",
    "average_fusions",
    "fuse_members",
    "leave_out_baselines",
    "load_evaluation",
    "open_fusion",
]

_SUMS = "evaluation.safetensors"
_EVALUATION = "evaluation.json"
HELD_OUT_FILE = "held_out.safetensors"

RouterChoice = tuple[type[OutputRouter], RouterOptions]


@dataclass(frozen=True, eq=False)
class Fusion:
    """The inputs of a fusion task, opened; banks are found again if they were built.

    Attributes:
        base: The shared base.
        settings: How it is fused.
        members: Names in the task's order.
        adapters: The finished tasks of their adapters.
        corpora: The corpora, each once, members' first.
        own_domain: Domain by member.
        baselines: Finished tasks of baselines by label.
        base_text: Finished corpora whose train text the base has read.
        folder: The task's folder.
    """

    base: Base
    settings: FusionSettings
    members: tuple[str, ...]
    adapters: tuple[Done, ...]
    corpora: tuple[Corpus, ...]
    own_domain: Mapping[str, str]
    baselines: Mapping[str, Done]
    base_text: tuple[Done, ...]
    folder: Path

    @cached_property
    def overlaps(self) -> tuple[Overlap, ...]:
        """Of each corpus: its held-out blocks compared with all text that was trained on.

        The train text of domains without a contributor counts, too, so that fusions of more and of
        fewer members are measured on the same blocks.

        Raises:
            ConfigError: If no block of a domain is left.
        """
        blocks = self.take(Split.HELD_OUT, self.settings.held_out)
        held_out = {str(number): part for number, part in enumerate(blocks)}
        found = measure_overlap(held_out, self.list_known(), self.base.tokenizer)
        gone = sorted(one.domain for one in found.values() if not one.kept.any())
        if gone:
            raise ConfigError(
                f"Cannot measure the fusion: expected held-out blocks of every domain that nobody "
                f"was trained on, got none of {', '.join(gone)}. Choose other domains."
            )
        return tuple(found.values())

    def list_known(self) -> Iterator[KnownText]:
        """Text that specialists, samples or the base have; loaded one at a time."""

        def index(blocks: Blocks) -> NDArray[np.uint64]:
            return index_blocks(blocks, self.base.tokenizer)

        samples = self.take(Split.CALIBRATION, self.settings.calibration)
        for number, (corpus, sample) in enumerate(zip(self.corpora, samples, strict=True)):
            yield KnownText("train", str(number), partial(index, corpus.blocks[Split.TRAIN]))
            yield KnownText("sample", str(number), partial(index, sample))
        for done in self.base_text:
            train = open_corpus(done).blocks[Split.TRAIN]
            yield KnownText("base", "", partial(index, train))

    def choose_routers(self) -> dict[str, RouterChoice]:
        """Class and options of each router by label."""
        registry = get_plugins().routers
        chosen: dict[str, RouterChoice] = {}
        for label, given in self.settings.routers.items():
            options = dict(given)
            router = registry.resolve(options.pop("router", label))
            if "top_k" in options:
                router = limit_experts(router, options.pop("top_k"))
            chosen[label] = (router, router.Options.model_validate(options))
        return chosen

    @property
    def frozen_depth(self) -> int:
        """K: blocks that no member changed."""
        return min(int(done.result.get("frozen_depth", 0)) for done in self.adapters)

    def load_adapters(self) -> list[Adapter]:
        """The members' adapters, in their order."""
        return [
            self._load(name, done) for name, done in zip(self.members, self.adapters, strict=True)
        ]

    def build_calibration_bank(
        self, readings: frozenset[Reading], progress: Any = None
    ) -> CalibrationBank:
        """The bank routers are fitted on."""
        blocks = self.take(Split.CALIBRATION, self.settings.calibration)
        return build_calibration(
            self.folder / "bank",
            self.base,
            self.list_experts(),
            blocks,
            **self._bank(readings, progress),
        )

    def build_held_out_bank(
        self, readings: frozenset[Reading], progress: Any = None
    ) -> HeldOutBank:
        """The bank that is reported from."""
        blocks = self.take(Split.HELD_OUT, self.settings.held_out)
        return build_held_out(
            self.folder / "bank",
            self.base,
            self.list_experts(),
            blocks,
            kept=[overlap.kept for overlap in self.overlaps],
            **self._bank(readings, progress),
        )

    def list_experts(self) -> list[Expert]:
        """The base, if it is an expert, then the members; each loads its adapter."""
        base = [Expert(BASE_EXPERT, None)] if self.settings.base_expert else []
        return base + [
            Expert(name, partial(self._load, name, done))
            for name, done in zip(self.members, self.adapters, strict=True)
        ]

    @staticmethod
    def _load(name: str, done: Done) -> Adapter:
        return load_adapter(done.folder / "adapter", plugins=get_plugins(), name=name)

    def take(self, split: Split, count: int) -> list[Blocks]:
        """The first blocks of a split, by corpus."""
        return [corpus.blocks[split].take(count) for corpus in self.corpora]

    def _bank(self, readings: frozenset[Reading], progress: Any) -> dict[str, Any]:
        return {
            "readings": readings,
            "mixture": self.settings.mixture,
            "frozen_depth": self.frozen_depth,
            "progress": progress,
        }


def open_fusion(settings: Mapping[str, Any], context_needs: Sequence[Done], folder: Path) -> Fusion:
    """Open what a `plan_fusion` task rests on.

    Args:
        settings: The fusion task's settings.
        context_needs: Its finished needs, in the task's order.
        folder: Where the bank's columns lie: the fusion task's folder, or another.
    """
    members = tuple(settings["members"])
    base, rest = context_needs[0], list(context_needs[1:])
    adapters = tuple(rest[0 : 2 * len(members) : 2])
    owned = rest[1 : 2 * len(members) : 2]
    rest = rest[2 * len(members) :]
    labels = list(settings["baselines"])
    baselines = dict(zip(labels, rest[: len(labels)], strict=True))
    rest = rest[len(labels) :]
    further, base_text = rest[: settings["further"]], rest[settings["further"] :]
    distinct = {done.task.key: done for done in [*owned, *further]}
    return Fusion(
        base=open_base(base),
        settings=FusionSettings.model_validate(settings["fusion"]),
        members=members,
        adapters=adapters,
        corpora=tuple(open_corpus(done) for done in distinct.values()),
        own_domain={n: d.task.settings["domain"] for n, d in zip(members, owned, strict=True)},
        baselines=baselines,
        base_text=tuple(base_text),
        folder=folder,
    )


def leave_out_baselines(task: Task) -> tuple[dict[str, Any], list[Task]]:
    """A fusion task's settings and needs without the models it compares, for `open_fusion`."""
    labels, first = task.settings["baselines"], 1 + 2 * len(task.settings["members"])
    needs = [*task.needs[:first], *task.needs[first + len(labels) :]]
    return {**task.settings, "baselines": []}, needs


def fuse_members(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fuse and measure; see `plan_fusion`."""
    fusion = open_fusion(settings, context.needs, context.folder)
    routers = fusion.choose_routers()
    readings: frozenset[Reading] = frozenset().union(
        {"evidence"}, *(router.reads(options) for router, options in routers.values())
    )
    start = time.monotonic()
    bank = fusion.build_calibration_bank(readings, context.progress)
    calibration = measure_loss_matrix(bank, fusion.own_domain)
    seconds = {"bank": time.monotonic() - start}
    fitted, reports = {}, {}
    for label, choice in routers.items():
        start = time.monotonic()
        found = _fit(choice, bank, fusion.settings)
        fitted[label] = found.router
        reports[label] = {"guard": found.to_json(), "seconds": {"fit": time.monotonic() - start}}
    held_out = fusion.build_held_out_bank(readings, context.progress)
    evaluation = evaluate(
        held_out, fitted, dict(_measure_baselines(fusion, held_out)), seed=fusion.settings.seed
    )
    _save_evaluation(evaluation, context.folder)
    matrix, fused = _read_matrix(evaluation, fusion.own_domain)
    return {
        "overlap": summarise_overlap(fusion.overlaps),
        "evaluation": evaluation.to_json(),
        "clusters": _count_clusters(evaluation),
        "calibration": _matrix_to_json(calibration),
        "held_out": {**_matrix_to_json(matrix), "fused": fused},
        "gains": {label: dict(compute_gains(matrix, losses)) for label, losses in fused.items()},
        "routers": reports,
        "members": {
            name: {
                key: done.result.get(key)
                for key in ("domain", "base_loss", "loss", "adapter_bytes", "steps")
            }
            for name, done in zip(fusion.members, fusion.adapters, strict=True)
        },
        "seconds": seconds,
    }


def _fit(
    choice: RouterChoice, bank: CalibrationBank, settings: FusionSettings
) -> GuardedRouter[OutputRouter]:
    router, options = choice
    restarts = 3 if settings.guarded else 0
    return fit_guarded(router, bank, options, settings.seed, restarts=restarts)


def _measure_baselines(fusion: Fusion, bank: HeldOutBank) -> Iterator[tuple[str, Tensor]]:
    """Losses (N, T-1) by label of merges and of models trained beside."""
    registry = get_plugins().merges
    if fusion.settings.merges:
        adapters = fusion.load_adapters()
        for name in fusion.settings.merges:
            label = "weight_average" if name == "average" else name
            merge = open_callable(registry, name)
            merged = merge(adapters, name=name, seed=fusion.settings.seed)
            yield label, bank.add_column(label, merged)
    for label, done in fusion.baselines.items():
        if (done.folder / "adapter").is_dir():
            adapter = load_adapter(done.folder / "adapter", plugins=get_plugins(), name=label)
            yield label, bank.add_column(label, adapter)
        else:
            yield label, _read_losses(done.folder / HELD_OUT_FILE, fusion.overlaps, label)


def _read_losses(path: Path, overlaps: Sequence[Overlap], label: str) -> Tensor:
    """Losses of a model of another shape on the bank's blocks.

    They are kept by domain in the order of the corpus's blocks, those that are left out included.
    """
    measured = load_file(path)
    parts = []
    for overlap in overlaps:
        losses, mask = measured.get(overlap.domain, torch.empty(0)), overlap.kept
        if len(losses) < len(mask):
            raise ConfigError(
                f"Cannot measure baseline '{label}': expected losses of {len(mask)} blocks of "
                f"domain '{overlap.domain}', got {len(losses)}. Measure as many blocks."
            )
        parts.append(losses[: len(mask)][torch.from_numpy(mask)])
    return torch.cat(parts)


def _read_matrix(
    evaluation: Evaluation, own_domain: Mapping[str, str]
) -> tuple[LossMatrix, dict[str, dict[str, float]]]:
    """Held-out losses of base and specialists, and of every router."""
    specialists = {name: evaluation.losses(f"specialist:{name}") for name in own_domain}
    matrix = LossMatrix(
        evaluation.domains, evaluation.losses("base"), specialists, dict(own_domain)
    )
    return matrix, {label: evaluation.losses(f"fused:{label}") for label in evaluation.gates}


def _count_clusters(evaluation: Evaluation) -> dict[str, int]:
    """Clusters of held-out documents by domain: what intervals are made from."""
    counts = np.bincount(evaluation.clusters.domain_of, minlength=len(evaluation.domains))
    return {domain: int(n) for domain, n in zip(evaluation.domains, counts, strict=True)}


def _matrix_to_json(matrix: LossMatrix) -> dict[str, Any]:
    return {
        "domains": list(matrix.domains),
        "base": dict(matrix.base),
        "specialists": {name: dict(losses) for name, losses in matrix.specialists.items()},
        "own_domain": dict(matrix.own_domain),
    }


def _save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Sums per cluster of every method, from which intervals over seeds are made."""
    tensors = {f"sums/{name}": torch.from_numpy(sums) for name, sums in evaluation.sums.items()}
    tensors["clusters/domain_of"] = torch.from_numpy(evaluation.clusters.domain_of)
    tensors["clusters/counts"] = torch.from_numpy(evaluation.clusters.counts)
    write_bytes(folder / _SUMS, save(tensors))
    card = {
        "domains": list(evaluation.domains),
        "methods": list(evaluation.sums),
        "gates": {router: dict(gates) for router, gates in evaluation.gates.items()},
        "seed": evaluation.seed,
    }
    write_json(folder / _EVALUATION, card)


def load_evaluation(folder: Path) -> Evaluation:
    """The evaluation that a fusion task kept."""
    card = json.loads((folder / _EVALUATION).read_bytes())
    tensors = load_file(folder / _SUMS)
    domain_of: NDArray[np.int64] = tensors["clusters/domain_of"].numpy()
    counts: NDArray[np.float64] = tensors["clusters/counts"].numpy()
    clusters = ClusterIndex(np.zeros(0, dtype=np.int64), domain_of, counts, len(card["domains"]))
    sums = {name: tensors[f"sums/{name}"].numpy() for name in card["methods"]}
    return Evaluation(tuple(card["domains"]), clusters, sums, card["gates"], card["seed"])


def average_fusions(settings: Mapping[str, Any], context: TaskContext) -> dict[str, Any]:
    """Average evaluations over seeds, cluster by cluster; see `plan_mean`.

    Raises:
        ConfigError: If they were not measured on the same held-out blocks with the same methods.
    """
    evaluations = [load_evaluation(done.folder) for done in context.needs]
    first = evaluations[0]
    for other in evaluations[1:]:
        if not (
            np.array_equal(first.clusters.counts, other.clusters.counts)
            and np.array_equal(first.clusters.domain_of, other.clusters.domain_of)
            and list(first.sums) == list(other.sums)
        ):
            raise ConfigError(
                "Cannot average fusions: expected the same methods on the same held-out blocks, "
                "got others. Average fusions that differ in seeds only."
            )
    mean = Evaluation(
        first.domains,
        first.clusters,
        {n: np.mean([e.sums[n] for e in evaluations], axis=0) for n in first.sums},
        {
            router: {
                domain: {
                    expert: float(np.mean([e.gates[router][domain][expert] for e in evaluations]))
                    for expert in by_expert
                }
                for domain, by_expert in gates.items()
            }
            for router, gates in first.gates.items()
        },
        first.seed,
    )
    return {
        "evaluation": mean.to_json(),
        "fusions": len(evaluations),
        "gains": [done.result["gains"] for done in context.needs],
        "equal_weight": [{n: e.equal_weight(n) for n in e.sums} for e in evaluations],
    }
