"""The whole way on a pretrained base: four contributors, every router, every rival, forecasts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from molora_fed.forecasting.pilots import MAX_SHARE
from molora_studies.framework.contract import Cell, Study, StudyOptions, Summary, Task
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_fusion,
    plan_mean,
    plan_pooled,
    plan_specialist,
)
from molora_studies.kalavai.baselines import plan_whole
from molora_studies.kalavai.comparisons import plan_differences
from molora_studies.kalavai.merge_tuning import plan_tuned_merges
from molora_studies.kalavai.real_base_summary import PAIRS, summarise_real_base

__all__ = ["RealBaseOptions", "RealBaseStudy"]

_FORWARD = 800.0  # tokens a second of a 135M model in bfloat16 on one core with AVX512-BF16
_TRAINING = 260.0  # the same of a training step

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "evidence-mixed": {},
    "evidence": {},
    "evidence-zero": {},
    "evidence-share": {},
    "evidence-hidden": {},
    "evidence-top-2": {"router": "evidence", "top_k": 2},
    "statistics": {},
    "linear": {},
    "linear-base": {"router": "linear", "input": "base_hidden"},
    "linear-noncausal": {},
    "mlp": {},
    "hard": {},
    "dispatch": {},
    "uniform": {},
}
"""Every router of this project, its default first."""


class Recipe(BaseModel):
    """How one sort of model is trained.

    Attributes:
        rates: Peaks of AdamW's rate that were tried, at the first seed, for as many steps.
        rate: The one of the lowest validation loss, taken at every seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rates: tuple[float, ...] = Field(min_length=1)
    rate: float = Field(gt=0)


USUAL_BASE = BaseSettings(source="bases/smollm2", block_size=512, dtype="bfloat16")


class RealBaseOptions(StudyOptions):
    """Options.

    Attributes:
        base: The base, a folder, a GGUF file or ID@REVISION; `make smollm2` makes the usual one.
            Beside `source`, `block_size`, `device` and `dtype` count, as usual where left out.
        known: Domains whose text the base has read much of, one contributor each.
        foreign: Domains whose text it has hardly read.
        steps: Steps of a specialist; rivals take as many as all specialists together.
        batch: Blocks a step.
        rank: R of every adapter.
        lora: Recipe of the LoRA specialists.
        svd: Recipe of the specialists of kind `svd`, trained at the first seed only.
        pooled_lora: Recipe of one LoRA adapter on everybody's text.
        base_continued: Recipe of the base with all its parameters on everybody's text.
        pilot_share: Share of the steps that a pilot has.
        pilot_blocks: Calibration blocks of each domain that pilots are measured on.
        merge_blocks: Calibration blocks of each domain that settings of merges are chosen on.
        validation: Validation blocks of each domain that are looked at.
        calibration: Calibration blocks of each domain.
        held_out: Held-out blocks of each domain.
    """

    base: BaseSettings = USUAL_BASE
    known: tuple[str, ...] = ("python", "science")
    foreign: tuple[str, ...] = ("man-pl", "man-tr")
    steps: int = Field(default=40, ge=1)
    batch: int = Field(default=2, ge=1)
    rank: int = Field(default=16, ge=1)
    lora: Recipe = Recipe(rates=(1e-3, 2e-3, 4e-3), rate=2e-3)
    svd: Recipe = Recipe(rates=(1e-4,), rate=1e-4)
    pooled_lora: Recipe = Recipe(rates=(1e-3, 2e-3, 4e-3), rate=2e-3)
    base_continued: Recipe = Recipe(rates=(1e-4, 2e-4, 4e-4), rate=2e-4)
    pilot_share: float = Field(default=MAX_SHARE, gt=0, le=MAX_SHARE)
    pilot_blocks: int = Field(default=8, ge=1)
    merge_blocks: int = Field(default=6, ge=1)
    validation: int = Field(default=8, ge=1)
    calibration: int = Field(default=38, ge=1)
    held_out: int = Field(default=40, ge=1)

    @field_validator("base", mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        return {**USUAL_BASE.model_dump(), **value} if isinstance(value, Mapping) else value

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains."""
        return (*self.known, *self.foreign)

    @property
    def total_steps(self) -> int:
        """Steps of all specialists together."""
        return self.steps * len(self.domains)


class RealBaseStudy(Study):
    """A cooperative a seed, its rivals, its forecasts, and the rates they were trained with."""

    Options: ClassVar[type[StudyOptions]] = RealBaseOptions
    title: ClassVar[str] = "Fusing specialists of a pretrained base"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: RealBaseOptions) -> Sequence[Cell]:
        """Rates, then pilots, fusion and tuned merges of every seed, then means, then `svd`."""
        plans = {seed: _Plan(options, seed) for seed in options.seeds}
        first, cells, fusions = plans[options.seeds[0]], [], []
        for recipe in ("lora", "pooled_lora", "base_continued", "svd"):
            for rate in getattr(options, recipe).rates:
                for label, task in first.try_rate(recipe, rate).items():
                    name = f"{recipe} {label} at {rate:g}"
                    cells.append(Cell(name, {"recipe": recipe, "on": label, "rate": rate}, task))
        for seed, plan in plans.items():
            fusions.append(plan.fuse("lora", ROUTERS, rivals=True))
            tuned = plan_tuned_merges(
                f"tuned merges seed {seed}", fusions[-1], blocks=options.merge_blocks
            )
            tokens = 6 * 3 * plan.count_tokens(options.merge_blocks)
            tuned = replace(tuned, seconds=tokens / _FORWARD)
            cells.append(Cell(f"pilots seed {seed}", {"seed": seed}, plan.measure_pilots()))
            cells.append(Cell(f"lora seed {seed}", {"seed": seed}, fusions[-1]))
            cells.append(Cell(f"tuned merges seed {seed}", {"seed": seed}, tuned))
        cells.append(Cell("mean", {}, plan_mean("real-base, mean", fusions)))
        cells.append(
            Cell("differences", {}, plan_differences("real-base, differences", fusions, PAIRS))
        )
        svd = first.fuse("svd", {"evidence-mixed": {}, "evidence": {}, "linear": {}}, rivals=False)
        cells.append(Cell(f"svd seed {first.seed}", {"seed": first.seed}, svd))
        return cells

    @classmethod
    def summarise(
        cls, options: RealBaseOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """See `real_base_summary`."""
        return summarise_real_base(options, results)


class _Plan:
    """Tasks of one seed."""

    def __init__(self, options: RealBaseOptions, seed: int) -> None:
        self.seed = seed
        self._options = options
        self._base = plan_base(options.base)
        self._corpora = {domain: plan_corpus(self._base, domain) for domain in options.domains}

    def count_tokens(self, blocks: int) -> int:
        """Tokens of so many blocks of every domain."""
        return blocks * len(self._corpora) * self._options.base.block_size

    def try_rate(self, recipe: str, rate: float) -> Mapping[str, Task]:
        """Trainings with a rate: one of a known and one of a foreign domain, or one on all text."""
        options = self._options
        if recipe in ("lora", "svd"):
            tried = (options.foreign[0], options.known[0])
            return {domain: self._train(domain, recipe, rate) for domain in tried}
        return {"everybody's text": self._train_rival(recipe, rate)}

    def measure_pilots(self) -> Task:
        """Pilots of all contributors on each other's calibration blocks."""
        options = self._options
        steps = max(1, int(options.pilot_share * options.steps))
        settings = FusionSettings(merges=(), calibration=options.pilot_blocks, seed=self.seed)
        task = plan_fusion(
            f"pilots seed {self.seed}",
            self._base,
            [
                Member(domain, self._train(domain, "lora", options.lora.rate, steps), corpus)
                for domain, corpus in self._corpora.items()
            ],
            settings,
        )
        tokens = self.count_tokens(options.pilot_blocks) * (len(self._corpora) + 1)
        return replace(task, action="measure-pilots", seconds=tokens / _FORWARD)

    def fuse(self, kind: str, routers: Mapping[str, Mapping[str, Any]], *, rivals: bool) -> Task:
        """Specialists of a kind, fused and measured beside merges and, if asked for, rivals."""
        options = self._options
        members = [
            Member(domain, self._train(domain, kind, getattr(options, kind).rate), corpus)
            for domain, corpus in self._corpora.items()
        ]
        settings = FusionSettings(
            routers=routers,
            merges=("average",),  # TIES and DARE are measured with tuned settings only
            calibration=options.calibration,
            held_out=options.held_out,
            seed=self.seed,
        )
        trained = {
            recipe: self._train_rival(recipe, getattr(options, recipe).rate)
            for recipe in ("pooled_lora", "base_continued")
            if rivals
        }
        task = plan_fusion(
            f"real-base {kind} seed {self.seed}", self._base, members, settings, baselines=trained
        )
        passes = (len(members) + 1) * self.count_tokens(options.calibration + options.held_out)
        further = (len(settings.merges) + 1) * self.count_tokens(options.held_out)
        return replace(task, seconds=(passes + further) / _FORWARD + 20 * len(routers))

    def _settings(self, **recipe: Any) -> SpecialistSettings:
        options = self._options
        return SpecialistSettings(
            rank=options.rank,
            batch=options.batch,
            validation=options.validation,
            seed=self.seed,
            **recipe,
        )

    def _train(self, domain: str, kind: str, rate: float, steps: int | None = None) -> Task:
        steps = steps or self._options.steps
        settings = self._settings(
            kind=kind, steps=steps, learning_rate=rate, validate_every=max(1, -(-steps // 3))
        )
        task = plan_specialist(self._base, self._corpora[domain], settings)
        return replace(task, seconds=self._estimate(steps, 1))

    def _train_rival(self, recipe: str, rate: float) -> Task:
        options, corpora = self._options, list(self._corpora.values())
        steps = options.total_steps
        if recipe == "pooled_lora":
            settings = self._settings(
                kind="lora", steps=steps, learning_rate=rate, validate_every=max(1, -(-steps // 6))
            )
            task = plan_pooled(self._base, corpora, settings)
        else:
            task = plan_whole(
                self._base,
                corpora,
                steps=steps,
                seed=self.seed,
                held_out=options.held_out,
                batch=options.batch,
                learning_rate=rate,
                validation=options.validation,
            )
        return replace(task, seconds=self._estimate(steps, len(corpora)))

    def _estimate(self, steps: int, domains: int) -> float:
        options = self._options
        trained = steps * options.batch * options.base.block_size
        looked_at = 6 * options.validation * domains * options.base.block_size
        return trained / _TRAINING + looked_at / _FORWARD
