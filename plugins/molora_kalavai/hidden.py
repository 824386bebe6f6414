"""What routers on a running mean of hidden states share: `linear`, `hard`, `mlp`."""

import abc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypeVar, override

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.evaluation.evaluate import compute_domain_losses, compute_router_losses
from molora_fed.routing.causal import causal_mean, causal_sum, count_since_start
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import fit_on_batches
from molora_fed.routing.summed import FitSetting
from molora_fed.storage.seeds import derive_seed
from molora_fed.types import Progress, Reading
from molora_kalavai.hidden_sums import GradientSums

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["HiddenOptions", "HiddenRouter", "draw_rows", "pool_causally", "read_hidden"]


class HiddenOptions(RouterOptions):
    """Options of the routers that are fitted by gradient on hidden states.

    Attributes:
        input: Hidden state the gates are computed from.
        steps: AdamW steps.
        batch: Blocks per step.
        learning_rate: Of AdamW, constant.
        curriculum: Share of the steps, the first ones, whose blocks are all of one domain; the
            paper's remedy against collapse is 0.2.
        restarts: Further fits from other starts; the lowest equal-weight calibration loss is kept.
    """

    input: Literal["mean_hidden", "base_hidden", "prefix_hidden"] = "mean_hidden"
    steps: int = Field(default=500, ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    curriculum: float = Field(default=0.0, ge=0, le=1)
    restarts: int = Field(default=0, ge=0)


HiddenOptionsT = TypeVar("HiddenOptionsT", bound=HiddenOptions, default=Any)


class HiddenRouter(OutputRouter[HiddenOptionsT]):
    """Gates computed from m_t, the mean of the document's hidden states up to t.

    Subclasses say what they learn, how they start, and how m_t becomes scores.

    Attributes:
        pooling: Name of what `pool` computes; routers of equal names share the numbers.
    """

    Options: ClassVar[type[RouterOptions]] = HiddenOptions
    pooling: ClassVar[str] = "causal-mean"

    @classmethod
    @abc.abstractmethod
    def draw(cls, names: Sequence[str], width: int, options: HiddenOptionsT, seed: int) -> Self:
        """The router before its first step, on the CPU; the order of experts must not matter.

        Args:
            names: The experts'.
            width: D.
            options: Its options.
            seed: Of what is drawn.
        """

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """D, the width of the hidden state it was fitted on."""

    @abc.abstractmethod
    def scorer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What turns pooled states (..., D) into scores (..., E), differentiably.

        Args:
            device: Where the states are.
        """

    @classmethod
    @override
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        return frozenset({cls.narrow(options).input})

    @classmethod
    @override
    def learn(
        cls,
        bank: "CalibrationBank",
        options: HiddenOptionsT,
        seed: int,
        progress: Progress | None,
    ) -> Self:
        """Fit on the bank; `seed` decides the start and the order of blocks."""
        runs = options.restarts + 1
        fits = (
            cls._fit_once(bank, options, _derive_seed(seed, run), _shift(progress, run, runs))
            for run in range(runs)
        )
        return next(fits) if runs == 1 else min(fits, key=lambda fit: _compute_loss(bank, fit))

    @classmethod
    def _fit_once(
        cls, bank: "CalibrationBank", options: HiddenOptionsT, seed: int, progress: Progress | None
    ) -> Self:
        router = cls.draw(bank.expert_names, bank.hidden_size, options, seed).to(bank.device)
        fit_on_batches(
            bank,
            cls.derive_pooled(bank, options),
            list(router.parameters()),
            router.scorer(bank.device),
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            seed=seed,
            curriculum=options.curriculum,
            progress=progress,
        )
        return router

    @classmethod
    def derive_pooled(cls, bank: "CalibrationBank", options: HiddenOptionsT) -> Tensor:
        """m_t of every position of a bank, (N, T, D) float32."""
        name: Reading = options.input
        return bank.derive(
            f"{cls.pooling}:{name}",
            lambda view: cls.pool(read_hidden(view, name, cls.name), view),
        )

    @classmethod
    @override
    def by_sums(cls, setting: FitSetting) -> "HiddenSums":
        return HiddenSums(setting, cls.narrow(setting.options), cls)

    @staticmethod
    def pool(hidden: Tensor, view: RouterView) -> Tensor:
        """m_t of every position, (B, T, D) float32."""
        return causal_mean(hidden, view.document_starts)

    def to_gates(self, scores: Tensor) -> Tensor:
        """Gates of scores, (..., E) both."""
        return torch.softmax(scores, dim=-1)

    @override
    def scores(self, view: RouterView) -> Tensor:
        hidden = read_hidden(view, self.options.input, self.name, self.width)
        return self.scorer(hidden.device)(self.pool(hidden, view))

    @override
    def gates(self, view: RouterView) -> Tensor:
        return self.to_gates(self.scores(view))

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Sum of the document's states, (B, D), and their number, (B,)."""
        device = next(self.parameters()).device
        return {
            "sum": torch.zeros(batch_size, self.width, device=device),
            "count": torch.zeros(batch_size, device=device),
        }

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        if not self.causal:
            return super().step(view, state)
        hidden = read_hidden(view, self.options.input, self.name, self.width)
        mean, state = pool_causally(hidden, view, state)
        return self.to_gates(self.scorer(hidden.device)(mean)), state


class HiddenSums(GradientSums):
    """A router on running means, fitted by sums.

    Args:
        setting: What all members agree on.
        options: The router's.
        router: Its class.
    """

    def __init__(
        self, setting: FitSetting, options: HiddenOptions, router: type[HiddenRouter]
    ) -> None:
        distance = options.learning_rate * options.steps
        super().__init__(setting, options, distance=distance, restarts=options.restarts)
        self._router = router
        self._options = options

    @override
    def draw(self, seed: int) -> dict[str, Tensor]:
        names, width = self.setting.expert_names, self.setting.hidden_size
        return self._router.draw(names, width, self._options, seed).state_tensors()

    @override
    def features(self, bank: "CalibrationBank") -> Tensor:
        return self._router.derive_pooled(bank, self._options)

    @override
    def make(self, tensors: Mapping[str, Tensor]) -> HiddenRouter:
        return self._router(self.setting.num_experts, self._options, tensors)

    @override
    def score(self, router: OutputRouter, features: Tensor) -> Tensor:
        return cast(HiddenRouter, router).scorer(features.device)(features)


def pool_causally(
    hidden: Tensor, view: RouterView, state: RouterState
) -> tuple[Tensor, dict[str, Tensor]]:
    """Running mean of the next positions of a text that is continued.

    Args:
        hidden: States of the next positions, (B, t, D), any float dtype.
        view: Their view.
        state: `sum` (B, D) and `count` (B,) of the document before them.

    Returns:
        Means (B, t, D) float32, and `sum` and `count` after them.
    """
    before = {name: tensor.to(hidden.device) for name, tensor in state.items()}
    total = causal_sum(hidden.float(), view.document_starts, carry=before["sum"])
    count = count_since_start(view.document_starts, carry=before["count"])
    return total / count.unsqueeze(-1), {"sum": total[:, -1], "count": count[:, -1]}


def read_hidden(view: RouterView, name: Reading, label: str, width: int | None = None) -> Tensor:
    """A hidden column of a view, (B, T, D).

    Args:
        view: The view.
        name: The column.
        label: The router's name, for errors.
        width: D the router was fitted on; None takes any.

    Raises:
        RoutingError: If the view has none.
        ShapeError: If it has another width.
    """
    column: Tensor | None = getattr(view, name)
    if column is None:
        raise RoutingError(
            f"Cannot route with '{label}': expected a view with {name}, got none. "
            "Build the bank with this reading."
        )
    if width is not None and column.shape[-1] != width:
        raise ShapeError(
            f"Cannot route with '{label}': expected {name} of width {width}, got "
            f"{column.shape[-1]}. Use the base it was fitted on."
        )
    return column


def draw_rows(names: Sequence[str], width: int, seed: int) -> Tensor:
    """Uniform numbers in +-width^-1/2, (names, width): each row is drawn by its name.

    A row that is drawn by its expert's name is the same in whatever order experts come.
    """
    bound = width**-0.5
    rows = []
    for name in names:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(width, generator=generator) * 2 * bound - bound)
    return torch.stack(rows)


def _derive_seed(seed: int, run: int) -> int:
    """The seed itself for the first run; unlike neighbouring seeds, the others never meet."""
    return seed if run == 0 else derive_seed(seed, run)


def _shift(progress: Progress | None, run: int, runs: int) -> Progress | None:
    """Progress of one run as a part of the overall progress."""
    if progress is None or runs == 1:
        return progress
    report = progress

    def shifted(done: int, total: int, **fields: float | str) -> None:
        report(run * total + done, runs * total, **fields)

    return shifted


def _compute_loss(bank: "CalibrationBank", router: OutputRouter) -> float:
    """Equal-weight calibration loss, nats per token."""
    losses = compute_domain_losses(bank, compute_router_losses(bank, router).nll)
    return sum(losses.values()) / len(losses)
