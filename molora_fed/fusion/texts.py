"""Where the texts of a fusion lie, and what is read of them: here, as samples, in `PooledTexts`.

Order and words of a fusion do not depend on it; see `fuse_texts`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from molora_fed.adapters.updates import Adapter
from molora_fed.bank import (
    CalibrationBank,
    HeldOutBank,
    build_calibration_bank,
    build_held_out_bank,
)
from molora_fed.contributions.contributed import Contributed, Entrant
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import ConfigError, RoutingError
from molora_fed.evaluation.evaluate import Evaluation, compute_domain_losses
from molora_fed.fusion.boundary import (
    NotMeasured,
    evaluate_routers,
    find_changes,
    fit_watched,
    measure_merges,
)
from molora_fed.fusion.collapse import GuardedRouter, fit_guarded
from molora_fed.fusion.held_out import HeldOutChoice, choose_held_out
from molora_fed.fusion.plan import FusionPlan
from molora_fed.models.base import Base
from molora_fed.models.forward import compute_block_losses
from molora_fed.routing.contract import OutputRouter
from molora_fed.types import LossMatrix, Progress

__all__ = [
    "Control",
    "FusionTexts",
    "Measured",
    "PooledTexts",
    "TextsRun",
    "list_measured",
    "measure_loss_matrix",
]


@dataclass(frozen=True, eq=False)
class Control:
    """A model of equal total cost that is reported beside the fused one.

    Attributes:
        model: An adapter of the base, or another checkpoint with the base's tokenizer.
        compute: Its cost, e.g. steps and tokens.
    """

    model: Adapter | Base
    compute: Mapping[str, Any]

    def measure(self, name: str, bank: HeldOutBank, batch: int) -> Tensor:
        """Its loss on the bank's blocks, (N, T-1) nats, at the bank's batch size.

        Raises:
            BankError: If the bank has no models.
            IncompatibleAdapterError: If its adapter does not fit the base.
        """
        if isinstance(self.model, Base):
            return compute_block_losses(self.model.model, bank.tokens, batch=batch)
        return bank.add_column(name, self.model)


class Measured(Protocol):
    """Held-out figures, however they were found."""

    def to_json(self) -> dict[str, Any]:
        """The evaluation's parts of report.json."""
        ...

    def difference(self, method: str, other: str) -> dict[str, float]:
        """Equal-weight loss of one method minus another's, nats per token, with its interval."""
        ...


class TextsRun(Protocol):
    """One fusion's dealings with the texts, in the order of these methods."""

    def measure_matrix(self) -> LossMatrix:
        """Losses of base and specialists on calibration text, for forecasts."""
        ...

    def fit(self) -> tuple[dict[str, GuardedRouter[Any]], dict[str, dict[str, Any]]]:
        """Routers under the collapse guard; and why others are left out, by name."""
        ...

    def prepare_held_out(self) -> None:
        """Choose the held-out blocks that count, and measure baselines on them."""
        ...

    def evaluate(self, routers: Mapping[str, OutputRouter], needed: frozenset[str]) -> Measured:
        """Evaluate routers on held-out text, once; a failure of a needed one ends the fusion."""
        ...

    def describe(self) -> dict[str, Any]:
        """Of which texts the figures are: overlap, corpus, calibration, held_out, held_out_kept."""
        ...


class FusionTexts(Protocol):
    """The contributors' texts, wherever they lie."""

    @property
    def contributions(self) -> Sequence[Entrant]:
        """Of whom."""
        ...

    @property
    def controls(self) -> Mapping[str, Control]:
        """Models of equal cost that can be measured on them, by name."""
        ...

    def open(
        self,
        base: Base,
        plan: FusionPlan,
        folder: Path,
        *,
        seed: int,
        missing: NotMeasured,
        progress: Progress | None,
    ) -> TextsRun:
        """Begin a fusion.

        Args:
            base: The charter's base.
            plan: What is fused how.
            folder: Where columns and answers are kept, so that a fusion that was killed goes on.
            seed: Of routers and bootstraps.
            missing: Receives routers and merges that fail.
            progress: Receives progress.
        """
        ...


@dataclass(frozen=True, eq=False)
class PooledTexts:
    """Texts that lie here, as contributions' samples.

    Attributes:
        contributions: With their samples.
        controls: See `FusionTexts`.
    """

    contributions: Sequence[Contributed]
    controls: Mapping[str, Control]

    def open(
        self,
        base: Base,
        plan: FusionPlan,
        folder: Path,
        *,
        seed: int,
        missing: NotMeasured,
        progress: Progress | None,
    ) -> "_PooledRun":
        """See `FusionTexts`.

        Raises:
            ConfigError: If blocks are missing.
        """
        ordered = sorted(self.contributions, key=lambda c: c.id)
        return _PooledRun(base, plan, folder, ordered, self.controls, seed, missing, progress)


def list_measured(contributions: Iterable[Contributed]) -> list[Blocks]:
    """The blocks that losses before a fusion are measured on, in the order of the contributions.

    Returns:
        Calibration blocks; admission blocks where no calibration blocks are pooled.

    Raises:
        ConfigError: If some contributors sent calibration blocks and others did not, or neither
            calibration nor admission blocks are here.
    """
    ordered = list(contributions)
    without = [c.contributor for c in ordered if not c.calibration]
    if without and len(without) < len(ordered):
        raise ConfigError(
            "Cannot fuse: expected calibration blocks from every contributor or from none, "
            f"got none from {', '.join(without)}. Leave them out, or ask for their blocks."
        )
    bare = [c.contributor for c in ordered if without and not c.admission]
    if bare:
        raise ConfigError(
            "Cannot fuse: expected calibration or admission blocks to measure losses on, "
            f"got none from {', '.join(bare)}. Ask for their blocks."
        )
    parts = (c.admission if without else c.calibration for c in ordered)
    return [part for part in parts if part is not None]


def measure_loss_matrix(bank: CalibrationBank, own_domain: Mapping[str, str]) -> LossMatrix:
    """Losses of base and specialists on calibration blocks, for forecasts.

    Args:
        bank: Calibration bank with all specialists as experts.
        own_domain: Domain each specialist was trained on, by expert name.
    """
    specialists = {
        name: compute_domain_losses(bank, bank.expert_nll(index))
        for index, name in enumerate(bank.expert_names)
        if name in own_domain
    }
    base = compute_domain_losses(bank, bank.base_nll())
    return LossMatrix(bank.domains, base, specialists, dict(own_domain))


class _PooledRun:
    """See `TextsRun`."""

    def __init__(
        self,
        base: Base,
        plan: FusionPlan,
        folder: Path,
        contributions: Sequence[Contributed],
        controls: Mapping[str, Control],
        seed: int,
        missing: NotMeasured,
        progress: Progress | None,
    ) -> None:
        self._base = base
        self._plan = plan
        self._folder = folder / "bank"
        self._contributions = contributions
        self._controls = controls
        self._seed = seed
        self._missing = missing
        self._progress = progress
        self._measured = list_measured(contributions)
        self._baselines: dict[str, Tensor] = {}

    def _open_calibration(self) -> CalibrationBank:
        return build_calibration_bank(
            self._folder,
            self._base,
            self._plan.experts,
            self._measured,
            progress=self._progress,
            **self._plan.bank,
        )

    def _open_held_out(self) -> HeldOutBank:
        return build_held_out_bank(
            self._folder,
            self._base,
            self._plan.experts,
            [c.held_out for c in self._contributions],
            kept=[self._choice.overlaps[c.contributor].kept for c in self._contributions],
            progress=self._progress,
            **self._plan.bank,
        )

    @cached_property
    def _choice(self) -> HeldOutChoice:
        return choose_held_out(self._contributions, self._base)

    def measure_matrix(self) -> LossMatrix:
        """See `TextsRun`."""
        return measure_loss_matrix(self._open_calibration(), self._plan.own_domain)

    def fit(self) -> tuple[dict[str, GuardedRouter[Any]], dict[str, dict[str, Any]]]:
        """Fit every router; those that learn are left out where no calibration is pooled."""
        plan, rules = self._plan, self._plan.charter.amendment.fusion
        is_pooled = all(c.calibration for c in self._contributions)
        guarded: dict[str, GuardedRouter[Any]] = {}
        left_out: dict[str, dict[str, Any]] = {}
        bank = self._open_calibration()
        before = bank.stamp()
        for name, (router_class, options) in plan.routers.items():
            if find_changes(before, bank):  # by a router that failed for it
                bank = self._open_calibration()
                before = bank.stamp()
            fit = partial(
                fit_guarded,
                router_class,
                bank,
                options,
                self._seed,
                collapse_nats=rules.collapse_nats,
                restarts=rules.restarts,
                progress=self._progress,
            )
            found: GuardedRouter[Any] | None = None
            with self._missing.skipping("router", name, unless=name == plan.router):
                found = fit_watched(plan.router_entry(name), bank, fit)
            if found is None:
                continue
            if is_pooled or not found.router.state_tensors():
                guarded[name] = found
            elif name == plan.router:
                raise RoutingError(
                    f"Cannot fit router '{name}': expected calibration blocks, got none from any "
                    "contributor. Fuse with a router that learns nothing, or ask for these blocks."
                )
            else:
                left_out[name] = {"left_out": "it learns, and no calibration blocks are pooled"}
        return guarded, left_out

    def prepare_held_out(self) -> None:
        """See `TextsRun`."""
        bank = self._open_held_out()
        merges = self._plan.charter.amendment.fusion.merges
        self._baselines = measure_merges(self._plan, bank, merges, self._missing, seed=self._seed)
        for name, control in self._controls.items():
            self._baselines[name] = control.measure(name, bank, self._plan.bank["batch"])

    def evaluate(self, routers: Mapping[str, OutputRouter], needed: frozenset[str]) -> Evaluation:
        """See `TextsRun`."""
        return evaluate_routers(
            self._open_held_out,
            self._plan,
            routers,
            needed,
            self._baselines,
            self._missing,
            seed=self._seed,
            progress=self._progress,
        )

    def describe(self) -> dict[str, Any]:
        """See `TextsRun`."""
        ordered = self._contributions
        return {
            "overlap": self._choice.to_json(),
            "corpus": {c.contributor: _count_blocks(c) for c in ordered},
            "calibration": {
                c.contributor: c.calibration.fingerprint for c in ordered if c.calibration
            },
            "held_out": {c.contributor: c.held_out.fingerprint for c in ordered},
            "held_out_kept": self._choice.fingerprint_kept(ordered),
        }


def _count_blocks(one: Contributed) -> dict[str, Any]:
    parts = (one.calibration, one.admission, one.held_out)
    counts = {
        str(part.split): {"blocks": len(part), "tokens": int(part.tokens.size)}
        for part in parts
        if part is not None
    }
    return {"domain": one.domain, **counts}
