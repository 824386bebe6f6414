"""A contributor's side of an evolution on private texts: answers questions on its own blocks.

Its calibration blocks are carved, by whole clusters, into what adapts, what fitness is measured on
and what guards; held-out blocks are looked at once. Nothing that leaves holds text or token ids:
means of gates, sums over documents, and adapted slots.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from molora_fed.bank.states import BaseStates, build_states
from molora_fed.charter import Charter
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import PopulationError, QuestionRefusedError
from molora_fed.evaluation.moments import MIN_CLUSTERS, Moments, measure_moments
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.population.adaptation import adapt
from molora_fed.population.asked import AskedQuestions
from molora_fed.population.contract import LossTable
from molora_fed.population.evolution import Branch
from molora_fed.population.files import fingerprint_population
from molora_fed.population.fitness import measure_losses
from molora_fed.population.losses import (
    compute_mean_gates,
    list_clusters,
    measure_population,
    sum_clusters,
)
from molora_fed.population.pooled import select_clusters
from molora_fed.population.private import name_slot
from molora_fed.population.questions import Answer, Question
from molora_fed.population.rounds import (
    MIN_ADAPTATION_BLOCKS,
    PlannedRound,
    count_limits,
    plan_rounds,
)
from molora_fed.population.router_files import pack_router, parse_router_options
from molora_fed.population.slots import check_population
from molora_fed.population.split import Carved, Shares, carve_blocks
from molora_fed.storage.files import canonical_json, hash_bytes
from molora_fed.storage.untrusted import clean
from molora_fed.types import Progress, Split

__all__ = ["PrivateMember", "carve_own"]


def carve_own(blocks: Mapping[Split, Blocks], charter: Charter) -> Carved:
    """Carve a contributor's own calibration blocks as the charter says.

    Args:
        blocks: Its blocks by split.
        charter: Decides shares, guard samples, and how many blocks are used at most.

    Raises:
        PopulationError: If there is too little text.
    """
    amendment = charter.amendment
    rules = amendment.population
    plan_rounds(amendment, threads=1)  # refuses too many rounds, and rounds of too few blocks
    own = blocks[Split.CALIBRATION].take(amendment.samples.calibration)
    carved = carve_blocks(
        [own],
        draws=rules.guard_samples,
        seed=amendment.seed,
        shares=Shares(rules.adaptation_share, rules.fitness_share, rules.guard_share),
    )
    parts = [("fitness", carved.fitness)]
    parts += [(f"guard sample {number}", part) for number, part in enumerate(carved.guard, 1)]
    found = {what: len(part.clusters[0]) for what, part in parts}
    held_out = blocks[Split.HELD_OUT].take(amendment.samples.held_out)
    found["held-out figures"] = len(list_clusters(held_out))
    few = [f"{count} for {what}" for what, count in found.items() if count < MIN_CLUSTERS]
    if few:
        raise PopulationError(
            f"Cannot take part with private texts of '{own.domain}': expected {MIN_CLUSTERS} "
            "document clusters at least in each part that figures are said of, so that no "
            f"document can be told from them, got {'; '.join(few[:4])}. Use more text, or ask the "
            "coordinator for guard 'spending', fewer generations, or more calibration blocks."
        )
    adapting = len(carved.adaptation[0])
    if adapting < MIN_ADAPTATION_BLOCKS:
        raise PopulationError(
            f"Cannot take part with private texts of '{own.domain}': expected "
            f"{MIN_ADAPTATION_BLOCKS} blocks at least that adapt, got {adapting}. Use more "
            "text, or ask the coordinator for more calibration blocks."
        )
    return carved


class PrivateMember:
    """Answers questions; the same question gives the same answer.

    Args:
        base: The charter's base; its model runs where it lies.
        blocks: This contributor's blocks by split.
        charter: The cooperative's charter.
        folder: Gets states of the base, adaptations, and the count of what was asked.
        threads: Torch threads of adaptation.
        plugins: Where the router is registered.
    """

    def __init__(
        self,
        base: Base,
        blocks: Mapping[Split, Blocks],
        charter: Charter,
        folder: Path,
        *,
        threads: int,
        plugins: Plugins,
    ) -> None:
        self._base = base
        self._carved = carve_own(blocks, charter)
        self._held_out = blocks[Split.HELD_OUT].take(charter.amendment.samples.held_out)
        self._batch = charter.identity.corpus.evaluation_batch
        self._folder = folder
        amendment = charter.amendment
        self._rounds = plan_rounds(amendment, threads=threads)
        limits = count_limits(amendment, self._rounds)
        self._asked = AskedQuestions(folder, amendment.number, limits)
        rules = charter.amendment.population
        router, options = parse_router_options(rules.router, rules.options, plugins)
        self._router = router, options
        self._readings = router.reads(options)
        self._router_name = rules.router
        self._states: dict[str, tuple[BaseStates, ...]] = {}

    def answer(self, question: Question, *, progress: Progress | None = None) -> Answer:
        """Do what is asked.

        Args:
            question: From the coordinator.
            progress: Told what is done of it.

        Returns:
            The answer, without a name: who sends it is known.

        Raises:
            QuestionRefusedError: If the charter does not have it asked, or not once more.
            PopulationError: If the question does not fit this base or these rules.
            MoloraError: Whatever adaptation refuses, and I/O errors.
        """
        place = self._find_place(question)
        for branch in question.branches:
            check_population(branch.population, self._base.model)
            if (type(branch.router), branch.router.options) != self._router:
                raise PopulationError(
                    f"Cannot answer: expected the charter's router '{self._router_name}' with its "
                    f"options, got {clean(type(branch.router).__name__, 80)} with "
                    f"{clean(branch.router.options)}. Ask the coordinator."
                )
        self._asked.admit(place, self._hash(question))
        if question.kind == "adapt":
            planned = self._rounds[question.settings["first_step"]]
            return Answer("", {}, self._adapt(question.branches[0], planned, progress))
        if question.kind == "fitness":
            return self._say(self._measure_fitness(question.branches[0], progress))
        if question.kind == "guard":
            return self._say(self._compare(question, progress))
        if question.kind == "gates":
            return Answer("", self._measure_gates(question.branches[0]))
        last, start = question.branches
        return self._say(self._measure_held_out(last, start, progress))

    def _find_place(self, question: Question) -> str:
        """What is asked, with its place in the evolution; all that settings can say.

        Raises:
            QuestionRefusedError: If they say something else.
        """
        settings = question.settings
        key = {"adapt": "first_step", "guard": "sample"}.get(question.kind)
        if settings.keys() == {key} - {None} and all(type(v) is int for v in settings.values()):
            return " ".join([question.kind, *(str(value)[:20] for value in settings.values())])
        raise QuestionRefusedError(
            f"Cannot answer the coordinator: expected {key or 'nothing'} as the only setting of "
            f"'{question.kind}', got {clean(list(settings))}. Everything else is the charter's: "
            "run the same molora-fed version on both sides."
        )

    def _hash(self, question: Question) -> str:
        """SHA-256 over everything that is asked."""
        parts: list[Any] = [question.kind, dict(question.settings)]
        for branch in question.branches:
            packed = pack_router(branch.router, self._router_name)
            parts += [fingerprint_population(branch.population), hash_bytes(packed)]
        return hash_bytes(canonical_json(parts))

    def _say(self, moments: Moments) -> Answer:
        return Answer("", moments.to_json())

    def _open(self, what: str, blocks: Sequence[Blocks]) -> tuple[BaseStates, ...]:
        """The base's states over some blocks, made once."""
        if what not in self._states:
            self._states[what] = build_states(
                self._base, blocks, self._readings, self._folder / "states", batch=self._batch
            )
        return self._states[what]

    def _adapt(self, branch: Branch, planned: PlannedRound, progress: Progress | None) -> Branch:
        settings = {**asdict(planned.config), "trained_factors": planned.factor}
        del settings["threads"]  # does not change the result
        packed = pack_router(branch.router, self._router_name)
        key = [fingerprint_population(branch.population), hash_bytes(packed), settings]
        folder = self._folder / "adaptation" / hash_bytes(canonical_json(key))[:16]
        for other in folder.parent.glob("*"):
            if other != folder:  # checkpoints of an earlier question, several times its size
                shutil.rmtree(other)
        adapted = adapt(
            self._base,
            branch.population,
            branch.router,
            self._open("adaptation", self._carved.adaptation),
            planned.config,
            folder,
            trained_factors=planned.factor,
            progress=progress,
        )
        return Branch(*adapted)

    def _measure_fitness(self, branch: Branch, progress: Progress | None) -> Moments:
        states = self._open("fitness", self._carved.fitness.blocks)
        table = measure_losses(
            self._base,
            branch.population,
            branch.router,
            states,
            batch=self._batch,
            progress=progress,
        )
        own: LossTable = select_clusters(table, self._carved.fitness.counts())
        columns = {"base": own.base, "full": own.full}
        for index, without in enumerate(own.without):
            columns[name_slot(index)] = without - own.full
        return measure_moments(own.counts, columns)

    def _compare(self, question: Question, progress: Progress | None) -> Moments:
        sample: int = question.settings["sample"]  # one of these: it was counted
        part = self._carved.guard[sample]
        states = self._open(f"guard-{sample}", part.blocks)
        lifecycle, twin = (self._sum(branch, states, progress) for branch in question.branches)
        chosen = part.counts()
        _, counts, _ = sum_clusters(part.blocks, [state.nll() for state in states])
        return measure_moments(counts[chosen], {"difference": (lifecycle - twin)[chosen]})

    def _sum(
        self,
        branch: Branch,
        states: Sequence[BaseStates],
        progress: Progress | None,
        gates: torch.Tensor | None = None,
    ) -> NDArray[np.float64]:
        """Losses of a branch by cluster, with its router or with gates equal everywhere."""
        losses = measure_population(
            self._base,
            branch.population,
            branch.router if gates is None else gates,
            states,
            batch=self._batch,
            progress=progress,
        )
        sums, _, _ = sum_clusters([state.blocks for state in states], losses)
        return sums

    def _measure_gates(self, branch: Branch) -> dict[str, Any]:
        states = self._open("fitness", self._carved.fitness.blocks)
        (means,) = compute_mean_gates(branch.router, states, batch=self._batch)
        positions = sum(len(state) * (state.blocks.block_size - 1) for state in states)
        return {"positions": positions, "gates": [float(mean) for mean in means]}

    def _measure_held_out(self, last: Branch, start: Branch, progress: Progress | None) -> Moments:
        """Losses of the base, of each slot of the start alone, of equal gates, and of the last.

        Beside each stands how much more it is than the last branch's.
        """
        states = self._open("held-out", [self._held_out])
        base, counts, _ = sum_clusters([self._held_out], [state.nll() for state in states])
        columns = {"base": base}
        slots = start.population.num_slots
        for index in range(slots):
            gates = torch.zeros(slots)
            gates[index] = 1.0
            columns[name_slot(index)] = self._sum(start, states, progress, gates)
        last_slots = last.population.num_slots
        equal = torch.full((last_slots,), 1.0 / last_slots)
        columns["uniform"] = self._sum(last, states, progress, equal)
        fused = self._sum(last, states, progress)
        more = {f"{name}-less-fused": column - fused for name, column in columns.items()}
        return measure_moments(counts, {**columns, "fused": fused, **more})
