"""Bytes of adapters against the fusion gain they keep; whether LoRA can fuse."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from molora_studies.framework.contract import Cell, Study, StudyOptions, Summary, Task
from molora_studies.framework.substrate import (
    BaseSettings,
    FusionSettings,
    Member,
    SpecialistSettings,
    plan_base,
    plan_corpus,
    plan_fusion,
    plan_specialist,
)
from molora_studies.kalavai.adapter_summary import summarise_adapters
from molora_studies.kalavai.conditions import THREE_DOMAINS

__all__ = ["AdapterRegimeOptions", "AdapterRegimeStudy", "Recipe", "Size", "Variant"]

ROUTERS: Mapping[str, Mapping[str, Any]] = {"evidence": {}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Strict):
    """A small adapter made of a full training.

    Attributes:
        kind: "svd", or "delta" for the whole difference with fewer bits.
        rank: Largest rank of svd.
        precision: How numbers are written.
        budget_percent: Largest file, in percent of the float32 difference's; ranks then differ by
            layer. None gives every layer the rank.
    """

    kind: str = "svd"
    rank: int = 64
    precision: str = "int4"
    budget_percent: float | None = None

    @property
    def label(self) -> str:
        """For people and as a key."""
        if self.kind == "delta":
            return f"delta {self.precision}"
        size = f"r{self.rank}" if self.budget_percent is None else f"{self.budget_percent:g} %"
        return f"svd {size} {self.precision}"


class Recipe(_Strict):
    """A training that gives a small adapter at once.

    Attributes:
        label: For people and as a key.
        training: Fields of `SpecialistSettings` that differ from kind lora, rank 32 and the size's
            steps.
        domains: Domains trained; None takes the size's.
        shard: Part i of n of each domain's documents, from 0: little text overfits.
        fused: Whether it is fused, which needs all domains and no shard.
        confirmed: Whether it is run at all seeds.
    """

    label: str
    training: Mapping[str, Any] = {}
    domains: tuple[str, ...] | None = None
    shard: tuple[int, int] = (0, 1)
    fused: bool = False
    confirmed: bool = False


class Size(_Strict):
    """A base and what is tried on it.

    Attributes:
        label: For people and as a key.
        base: Fields of `BaseSettings`.
        domains: One contributor each.
        specialist: Fields of `SpecialistSettings` of full fine-tuning (kind delta).
        fusion: Fields of `FusionSettings`: numbers of blocks.
        screened: Variants measured at the first seed on validation blocks.
        confirmed: Variants fused at every seed.
        recipes: Trainings of small adapters.
        blocks: Validation blocks of the screening.
    """

    label: str
    base: Mapping[str, Any]
    domains: tuple[str, ...] = THREE_DOMAINS
    specialist: Mapping[str, Any] = {}
    fusion: Mapping[str, Any] = {"calibration": 64, "held_out": 96}
    screened: tuple[Variant, ...] = ()
    confirmed: tuple[Variant, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    blocks: int = 64


def _svd(*ranks: int, precisions: Sequence[str]) -> tuple[Variant, ...]:
    return tuple(Variant(rank=r, precision=p) for r in ranks for p in precisions)


def _budgets(*percents: float, rank: int, precision: str = "int4") -> tuple[Variant, ...]:
    return tuple(Variant(rank=rank, budget_percent=p, precision=precision) for p in percents)


_DELTAS = tuple(Variant(kind="delta", precision=p) for p in ("int8", "int4", "int2"))
_ATTENTION = {"options": {"targets": "attention"}}
_PAPER = {**_ATTENTION, "learning_rate": 2e-4}

SMALL = Size(
    label="D=192",
    base={"hidden": 192, "layers": 4, "steps": 2000, "learning_rate": 2e-3, "threads": 1},
    specialist={"steps": 400},
    screened=(
        *_svd(8, 32, 64, 192, precisions=("float32", "int8", "int4")),
        *_budgets(10, 5, 2.5, rank=192),
        *_svd(64, 96, 128, precisions=("int2",)),
        *_budgets(5, 2.5, rank=192, precision="int2"),
        *_DELTAS,
    ),
    confirmed=(
        *_budgets(5, rank=192, precision="int2"),
        Variant(rank=64),
        Variant(kind="delta", precision="int2"),
    ),
    recipes=(
        Recipe(label="lora all-linear r32", fused=True, confirmed=True),
        Recipe(label="lora attention r32", training=_ATTENTION, fused=True),
        Recipe(label="lora attention r32 lr 2e-4", training=_PAPER, domains=("python",)),
        Recipe(label="lora all-linear r8", training={"rank": 8}, domains=("python",)),
        Recipe(
            label="lora all-linear r32 lr x 1/3",
            training={"learning_rate": 9e-4},
            domains=("python",),
        ),
        Recipe(
            label="lora attention r32, 1/16 of the text",
            training={**_ATTENTION, "steps": 600, "validate_every": 50},
            domains=("python",),
            shard=(0, 16),
        ),
    ),
)

LARGE = Size(
    label="D=768",
    base={
        "hidden": 768,
        "layers": 2,
        "heads": 8,
        "steps": 400,
        "learning_rate": 1e-3,
        "init_std": 0.02,
        "threads": 1,
    },
    domains=("python", "science"),
    specialist={"steps": 100, "learning_rate": 3e-4, "validate_every": 25},
    fusion={"calibration": 40, "held_out": 56},
    screened=(
        *_svd(16, 64, precisions=("float32", "int4")),
        *_budgets(10, 5, 2.5, rank=768),
        Variant(kind="delta"),
    ),
    confirmed=(*_budgets(2.5, rank=768), *_budgets(1.25, rank=768, precision="int2")),
    recipes=(Recipe(label="lora all-linear r32", fused=True),),
    blocks=32,
)


class AdapterRegimeOptions(StudyOptions):
    """Options.

    Attributes:
        sizes: Bases and what is tried on each.
        kept_percent: Share of the full gain that an adapter must keep.
        bytes_percent: Share of the full difference's bytes aimed at.
    """

    sizes: tuple[Size, ...] = Field(default=(SMALL, LARGE), min_length=1)
    kept_percent: float = 85.0
    bytes_percent: float = 10.0


class AdapterRegimeStudy(Study):
    """One full training a domain and seed; everything small but LoRA is derived from it."""

    Options: ClassVar[type[StudyOptions]] = AdapterRegimeOptions
    title: ClassVar[str] = "Bytes of adapters against the fusion gain they keep"
    measures: ClassVar[tuple[str, ...]] = ("molora_kalavai",)

    @classmethod
    def plan(cls, options: AdapterRegimeOptions) -> Sequence[Cell]:
        """Screening at the first seed, fusions and comparisons at all."""
        return [cell for size in options.sizes for cell in _SizePlan(size, options.seeds).cells()]

    @classmethod
    def summarise(
        cls, options: AdapterRegimeOptions, results: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Tables of bytes and gain kept, and the smallest adapter that keeps enough."""
        labels = {cell.name: cell.labels for cell in cls.plan(options)}
        return summarise_adapters(
            [(labels[name], result) for name, result in results.items()],
            kept_percent=options.kept_percent,
            bytes_percent=options.bytes_percent,
        )


class _SizePlan:
    """Tasks of one size."""

    def __init__(self, size: Size, seeds: Sequence[int]) -> None:
        self.size = size
        self.seeds = seeds
        self.base = plan_base(BaseSettings(**size.base))

    def cells(self) -> list[Cell]:
        size, first = self.size, self.seeds[0]
        full = [self._fuse_full(seed) for seed in self.seeds]
        cells = [
            Cell(f"{size.label} screening {domain}", self._labels("screening", domain=domain), task)
            for domain in size.domains
            if size.screened
            for task in (self._screen(domain, first),)
        ]
        for variant in size.confirmed:
            small = [self._fuse_variant(variant, seed) for seed in self.seeds]
            cells.append(self._compare(variant.label, full, small))
        for recipe in size.recipes:
            seeds = self.seeds if recipe.confirmed else self.seeds[:1]
            cells += [
                Cell(
                    f"{size.label} {recipe.label} {domain} seed {seed}",
                    self._labels("recipe", recipe=recipe.label, domain=domain, seed=seed),
                    self._train(recipe, domain, seed),
                )
                for seed in seeds
                for domain in recipe.domains or size.domains
            ]
            if recipe.fused:
                small = [self._fuse_recipe(recipe, seed) for seed in seeds]
                cells.append(self._compare(recipe.label, full[: len(seeds)], small))
        return cells

    def _labels(self, part: str, **more: Any) -> dict[str, Any]:
        return {"size": self.size.label, "part": part, **more}

    def _corpus(self, domain: str, shard: tuple[int, int] = (0, 1)) -> Task:
        return plan_corpus(self.base, domain, shard=shard)

    def _full(self, domain: str, seed: int) -> Task:
        settings = SpecialistSettings(**{**self.size.specialist, "kind": "delta", "seed": seed})
        return plan_specialist(self.base, self._corpus(domain), settings)

    def _screen(self, domain: str, seed: int) -> Task:
        variants = {v.label: v.model_dump(mode="json") for v in self.size.screened}
        full = self._full(domain, seed)
        return Task(
            name=f"screening {self.size.label} {domain} seed={seed}",
            action="screen-variants",
            settings={"variants": variants, "blocks": self.size.blocks},
            needs=(self.base, self._corpus(domain), full),
            seconds=5 + 1.2e-8 * len(variants) * self.size.blocks * self._width(),
        )

    def _width(self) -> float:
        base = BaseSettings(**self.size.base)
        return 12.0 * base.layers * base.hidden**2

    def _derive(self, variant: Variant, domain: str, seed: int) -> Task:
        return Task(
            name=f"{variant.label} of {self.size.label} {domain} seed={seed}",
            action="derive-adapter",
            settings=variant.model_dump(mode="json"),
            needs=(self._full(domain, seed),),
            seconds=3 + 1e-6 * self._width(),
        )

    def _train(self, recipe: Recipe, domain: str, seed: int) -> Task:
        common = {k: v for k, v in self.size.specialist.items() if k != "learning_rate"}
        chosen = {"kind": "lora", "rank": 32, **common, **recipe.training, "seed": seed}
        like = plan_specialist(
            self.base, self._corpus(domain, recipe.shard), SpecialistSettings(**chosen)
        )
        return Task(
            name=f"{recipe.label}: {like.name}",
            action="train-recipe",
            settings=like.settings,
            needs=like.needs,
            seconds=like.seconds,
        )

    def _fuse(self, name: str, adapters: Mapping[str, Task], seed: int) -> Task:
        members = [Member(d, adapter, self._corpus(d)) for d, adapter in adapters.items()]
        settings = FusionSettings(
            **{"routers": ROUTERS, "merges": (), **self.size.fusion, "seed": seed}
        )
        return plan_fusion(f"{name} {self.size.label} seed={seed}", self.base, members, settings)

    def _fuse_full(self, seed: int) -> Task:
        return self._fuse("full", {d: self._full(d, seed) for d in self.size.domains}, seed)

    def _fuse_variant(self, variant: Variant, seed: int) -> Task:
        adapters = {d: self._derive(variant, d, seed) for d in self.size.domains}
        return self._fuse(variant.label, adapters, seed)

    def _fuse_recipe(self, recipe: Recipe, seed: int) -> Task:
        adapters = {d: self._train(recipe, d, seed) for d in self.size.domains}
        return self._fuse(recipe.label, adapters, seed)

    def _compare(self, label: str, full: Sequence[Task], small: Sequence[Task]) -> Cell:
        task = Task(
            name=f"{label} against full {self.size.label}, {len(full)} seeds",
            action="compare-fusions",
            settings={},
            needs=(*full, *small),
            seconds=3,
        )
        return Cell(f"{self.size.label} {label}", self._labels("fusion", variant=label), task)
