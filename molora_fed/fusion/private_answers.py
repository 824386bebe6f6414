"""A member's side of a fusion whose texts stay with their owners: banks at home, sums as answers.

It runs every expert over its own blocks once, as a fusion on pooled text would, and measures on
these banks what a question asks for. Whatever goes wrong on a text is told at home alone: the
reason may hold a figure of one document.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from molora_fed.bank import (
    CalibrationBank,
    HeldOutBank,
    build_calibration_bank,
    build_held_out_bank,
)
from molora_fed.charter import Charter
from molora_fed.contributions.contributed import Contributed, Entrant
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import CorpusError, PluginError, RoutingError
from molora_fed.evaluation.moments import Moments
from molora_fed.evaluation.summed import measure_alone, measure_sums
from molora_fed.fusion.boundary import NotMeasured, check_fitted, measure_merges
from molora_fed.fusion.claims import measure_claims
from molora_fed.fusion.held_out import (
    Elsewhere,
    HeldOutChoice,
    choose_held_out,
    compare_held_out,
    list_known,
)
from molora_fed.fusion.plan import FusionPlan, plan_fusion
from molora_fed.fusion.shortlist import (
    CHOICE_BLOCKS,
    COST_BLOCKS,
    choose_blocks,
    choose_experts,
    measure_cost,
)
from molora_fed.fusion.sum_questions import HELD_OUT, SumQuestion, TextCounts
from molora_fed.fusion.sum_rounds import SumRounds
from molora_fed.models.base import Base
from molora_fed.plugins import Plugins
from molora_fed.routing.contract import OutputRouter
from molora_fed.types import Progress, Split

__all__ = ["FusionMember"]


class FusionMember:
    """Answers the questions of one fusion; the same question gives the same answer.

    Args:
        base: The charter's base; its model runs where it lies.
        charter: The cooperative's charter.
        blocks: This contributor's blocks by split.
        corpus: Folder of its prepared corpus; None where there is none to compare with.
        experts: All admitted contributions, this member's among them.
        name: This contributor's name.
        folder: Gets `bank/`, in which columns of experts that stay are found again.
        plugins: Where routers, adapter kinds and merges are registered.

    Attributes:
        plan: The fusion's.
        prepared: All held-out blocks of the corpus; the fusion takes the first of them.

    Raises:
        CharterError: If a router's options are wrong.
        ConfigError: If experts clash, or this contributor is not among them.
        CorpusError: If the charter asks for blocks that there are not.
    """

    def __init__(
        self,
        base: Base,
        charter: Charter,
        blocks: Mapping[Split, Blocks],
        corpus: Path | None,
        experts: Sequence[Entrant],
        *,
        name: str,
        folder: Path,
        plugins: Plugins,
    ) -> None:
        self._base = base
        self._seed = charter.amendment.seed
        self._folder = folder / "bank"
        self.plan: FusionPlan = plan_fusion(base, charter, experts, plugins)
        (own,) = (one for one in self.plan.contributions if one.contributor == name)
        samples = charter.amendment.samples
        calibration = blocks[Split.CALIBRATION].take(samples.calibration)
        self.prepared = blocks[Split.HELD_OUT]
        held_out = self.prepared.take(samples.held_out)
        if not (len(calibration) and len(held_out)):
            raise CorpusError(
                f"Cannot take part with the text of '{name}': expected calibration and held-out "
                f"blocks, got {len(calibration)} and {len(held_out)}. Use more text."
            )
        self._choice: HeldOutChoice | None = None
        self._stand_ins: frozenset[str] | None = None
        self._own = Contributed(
            **vars(own), held_out=held_out, calibration=calibration, train_text=corpus
        )

    @property
    def hidden_size(self) -> int:
        """D of the base."""
        return int(self._base.model.config.hidden_size)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base."""
        return self._base.tokenizer

    @property
    def held_out(self) -> Blocks:
        """The held-out blocks of this fusion."""
        return self._own.held_out

    @property
    def has_train_text(self) -> bool:
        """Whether the text that its specialist was trained on is here."""
        return self._own.train_text is not None

    def index_known(self) -> NDArray[np.uint64]:
        """Word 8-grams that this member's specialist and all routers read, each once, sorted."""
        texts = list_known([self._own], self.tokenizer)
        return np.unique(np.concatenate([text.load() for text in texts]))

    @cached_property
    def _at_home(self) -> HeldOutChoice:
        return choose_held_out([self._own], self._base)

    def count(
        self, measured: Sequence[str] = (), *, progress: Progress | None = None
    ) -> TextCounts:
        """What this member has, its held-out blocks compared with the text that is here.

        Args:
            measured: Whose adapters it measures, to see whether they do what was stated.
            progress: Receives blocks done while experts are run.

        Raises:
            SumError: If there are too few documents for figures.
            MoloraError: Whatever banks and experts raise.
        """
        counts = self._count(self._at_home)
        if not measured:
            return counts
        who = self._own.contributor
        others = self._names - frozenset(measured) if self.plan.shortlist else ()
        bank = self._open_calibration(progress, stand_ins=others)
        return counts.model_copy(update={"claims": measure_claims(bank, measured, who=who)})

    def compare(self, elsewhere: Elsewhere) -> TextCounts:
        """Choose held-out blocks anew, by others' text too: what is measured ever after.

        Args:
            elsewhere: What was found of others' text.

        Returns:
            What this member has now.
        """
        self._choice = compare_held_out([self._own], self._base, elsewhere)
        return self._count(self._choice)

    def _count(self, choice: HeldOutChoice) -> TextCounts:
        overlap = choice.overlaps[self._own.contributor]
        kept = overlap.kept
        size = self._own.held_out.block_size - 1
        assert self._own.calibration is not None
        return TextCounts(
            domain=self._own.domain,
            tokens=len(self._own.calibration) * size,
            blocks=len(kept),
            left_out=int((~kept).sum()),
            empty=int((overlap.totals == 0).sum()),
            grams=int(overlap.totals.sum()),
            own=overlap.own,
            union=overlap.union,
            base=overlap.base,
            kept=int(overlap.totals[kept].sum()),
            after=int(overlap.known[kept].sum()),
            compared=sorted(choice.trained),
            has_base=choice.has_base,
        )

    def measure(
        self, question: SumQuestion, rounds: SumRounds, *, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """The sums that a question asks for, by part; see `SumRounds.lay_out`.

        Args:
            question: From the coordinator; its place was admitted.
            rounds: Of this fusion.
            progress: Receives blocks done while experts are run.

        Raises:
            RoutingError: If a router fails on this text; the reason is the cause, and stays here.
            SumError: If there are too few documents for sums.
            MoloraError: Whatever banks and experts raise.
        """
        name, domain = self._own.contributor, self._own.domain
        try:
            if question.kind == HELD_OUT:
                bank = self._open_held_out(progress)
                routers = {
                    router: rounds.build_router(router, question.of(router))
                    for router in question.routers
                }
                if question.kind == rounds.probed:
                    self._probe(question, rounds, self._open_calibration(progress))
                baselines = self._measure_merges(bank)
                said = measure_sums(bank, routers, baselines, who=name, progress=progress)
                found = rounds.pack_held_out(said, question.routers)
                if self.plan.shortlist:
                    found |= rounds.pack_cost(self._measure_cost(routers, progress), domain)
                return found
            calibration = self._open_calibration(progress)
            found = rounds.measure(question, calibration)
            if question.kind == rounds.probed:
                self._probe(question, rounds, calibration)
            if question.is_first:
                found |= rounds.pack_alone(measure_alone(calibration, who=name), domain)
            return found
        except PluginError as error:
            raise RoutingError(
                f"Cannot answer '{question.place}' on the text of '{name}': expected routers and "
                "merges that keep to their contracts, got one that fails. The reason may hold a "
                "figure of one document and stays with that contributor: leave that router out."
            ) from error

    def _probe(self, question: SumQuestion, rounds: SumRounds, bank: CalibrationBank) -> None:
        """Ask fitted routers what only their authors could promise, before they are published."""
        for name in question.routers:
            router = rounds.build_router(name, question.of(name))
            check_fitted(self.plan.router_entry(name), router, bank)

    def _measure_merges(self, bank: HeldOutBank) -> dict[str, Tensor]:
        missing = NotMeasured()
        merges = self.plan.charter.amendment.fusion.merges
        found = measure_merges(self.plan, bank, merges, missing, seed=self._seed)
        if missing.reasons:  # every member sends the same columns, or none
            failed = ", ".join(missing.reasons["merge"])
            raise RoutingError(
                f"Cannot measure merges on the text of '{self._own.contributor}': expected all of "
                f"the charter's, got a failure of {failed}. Leave it out of fusion.merges."
            )
        return found

    @property
    def _names(self) -> frozenset[str]:
        return frozenset(expert.name for expert in self.plan.experts)

    def _choose_stand_ins(self, progress: Progress | None) -> frozenset[str]:
        """Experts that are not on the shortlist: they are run on a few blocks only."""
        if self._stand_ins is None:
            size, chosen = self.plan.shortlist, self._names
            if size is not None:
                assert self._own.calibration is not None
                some = choose_blocks(self._own.calibration, CHOICE_BLOCKS)
                probed = self._build_calibration(some, progress, ())
                chosen = choose_experts(probed, size, self._own.contributor)
            self._stand_ins = self._names - chosen
        return self._stand_ins

    def _measure_cost(
        self, routers: Mapping[str, OutputRouter], progress: Progress | None
    ) -> Moments:
        """What the shortlist costs, on blocks that it was not chosen by."""
        some = choose_blocks(self._own.held_out.select(self._kept), COST_BLOCKS)
        short, whole = (
            build_held_out_bank(
                self._folder,
                self._base,
                self.plan.experts,
                [some],
                stand_ins=names,
                progress=progress,
                **self.plan.bank,
            )
            for names in (self._choose_stand_ins(progress), ())
        )
        return measure_cost(whole, short, routers, who=self._own.contributor)

    def _open_calibration(
        self, progress: Progress | None, *, stand_ins: Collection[str] | None = None
    ) -> CalibrationBank:
        assert self._own.calibration is not None
        names = self._choose_stand_ins(progress) if stand_ins is None else stand_ins
        return self._build_calibration(self._own.calibration, progress, names)

    def _build_calibration(
        self, blocks: Blocks, progress: Progress | None, stand_ins: Collection[str]
    ) -> CalibrationBank:
        return build_calibration_bank(
            self._folder,
            self._base,
            self.plan.experts,
            [blocks],
            stand_ins=stand_ins,
            progress=progress,
            **self.plan.bank,
        )

    @property
    def _kept(self) -> NDArray[np.bool_]:
        """Which held-out blocks count, (N,)."""
        choice = self._choice or self._at_home
        choice.check_kept()
        return choice.overlaps[self._own.contributor].kept

    def _open_held_out(self, progress: Progress | None) -> HeldOutBank:
        return build_held_out_bank(
            self._folder,
            self._base,
            self.plan.experts,
            [self._own.held_out],
            kept=[self._kept],
            stand_ins=self._choose_stand_ins(progress),
            progress=progress,
            **self.plan.bank,
        )
