"""What a router is: the contract of `register_routers`.

A view at position t holds only what is known after reading token x_t, and `gates[:, t]` weigh
the experts' predictions of x_{t+1}. `molora_fed.testing.check_router_conformance` proves it.
"""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, get_args

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from molora_fed.bank.views import RouterView
from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.fitting import check_calibration
from molora_fed.storage.options import PluginOptions
from molora_fed.types import Progress, Reading

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank
    from molora_fed.models.hidden_statistics import HiddenStatistics
    from molora_fed.routing.summed import FitSetting, SummedFit

__all__ = ["OutputRouter", "RouterOptions", "RouterState"]

RouterState = Mapping[str, Tensor]
"""What a router remembers between decoding steps: tensors with the batch first."""


class RouterOptions(PluginOptions):
    """Base of every router's options: unknown keys are refused."""


OptionsT = TypeVar("OptionsT", bound=RouterOptions, default=Any)


class OutputRouter(nn.Module, abc.ABC, Generic[OptionsT]):
    """A fitted router whose gates mix the experts' output distributions.

    A router declares `readings` and computes `scores`; one that remembers what it read overrides
    `init_state` and `step`, one that learns overrides `shapes` and `learn`. There is no unfitted
    router: `fit` makes one from a calibration bank, the constructor from saved tensors.

    Attributes:
        Options: Pydantic model of its options: the class in brackets after `OutputRouter`.
        name: Registered name, for messages.
        readings: Columns it reads; `reads` tells where the options decide.
        causal: False only for forms kept for reproduction; these cannot generate.
        num_experts: E.
        options: The options it was fitted with.
    """

    Options: ClassVar[type[RouterOptions]] = RouterOptions
    name: ClassVar[str] = ""
    readings: ClassVar[frozenset[Reading]] = frozenset()
    causal: ClassVar[bool] = True

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for base in vars(cls).get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, RouterOptions):
                    cls.Options = argument

    def __init__(
        self,
        num_experts: int,
        options: RouterOptions | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make a router of what `state_tensors` gave.

        Args:
            num_experts: E.
            options: Its options; the defaults if None.
            tensors: Everything learned, named and shaped as `shapes` says.

        Raises:
            RoutingError: If the options are another router's.
            ShapeError: If a tensor is missing, unknown or has another shape.
        """
        super().__init__()
        self.num_experts = num_experts
        self.options: OptionsT = self.narrow(self.Options() if options is None else options)
        given = dict(tensors or {})
        self._check_shapes(given)
        for name in self.shapes(num_experts, self.options):
            self.register_parameter(name, nn.Parameter(given[name], requires_grad=False))
        self.eval()

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """The columns `fit` and `gates` read under these options."""
        return cls.readings

    @classmethod
    def bound_excess(cls, num_experts: int) -> float | None:
        """Most by which a document can cost more than under its best expert, nats.

        It holds for any experts, any text and anything learned, of the loss summed over a
        document's tokens after its first (and over the part of a document that lies in a block)
        under the probability mixture. None promises nothing.

        Args:
            num_experts: E.
        """
        return None

    @classmethod
    def shapes(cls, num_experts: int, options: OptionsT) -> Mapping[str, tuple[int | str, ...]]:
        """Names and shapes of what is learned; a letter stands for the same size everywhere.

        Args:
            num_experts: E.
            options: This router's options.
        """
        return {}

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """Fit on calibration data; the same bank, options and seed give the same router.

        Args:
            bank: Calibration blocks with the columns that `reads` names.
            options: This router's options.
            seed: Of whatever is drawn.
            progress: Receives steps done and in all.

        Raises:
            RoutingError: If the bank is no calibration bank, or the options are another router's.
        """
        check_calibration(bank)
        return cls.learn(bank, cls.narrow(options), seed, progress)

    @classmethod
    def learn(
        cls, bank: "CalibrationBank", options: OptionsT, seed: int, progress: Progress | None
    ) -> Self:
        """What `fit` does once its arguments are checked; by default there is nothing to learn."""
        return cls(bank.num_experts, options)

    @classmethod
    def by_sums(cls, setting: "FitSetting") -> "SummedFit | None":
        """How it is fitted where text stays with its owners, by sums over members' own tokens.

        Args:
            setting: What all members agree on, this router's options among it.

        Returns:
            None where it cannot be; a router that learns nothing needs none.
        """
        return None

    @classmethod
    def from_statistics(
        cls, statistics: Mapping[str, "HiddenStatistics"], setting: "FitSetting"
    ) -> "Self | None":
        """The router that follows from what contributors published of their hidden states.

        Args:
            statistics: Of the base's last hidden states over each contributor's calibration text,
                by the contributor's name, which is its expert's, too. The base, where it is an
                expert, has none.
            setting: What the fusion is of, this router's options among it.

        Returns:
            None where it cannot be made so; a router that learns nothing needs no hook.
        """
        return None

    @abc.abstractmethod
    def scores(self, view: RouterView) -> Tensor:
        """Rank all experts at every position, (B, T, E); higher is better, any scale."""

    def gates(self, view: RouterView) -> Tensor:
        """Gates of shape (B, T, E), non-negative, summing to 1 over E."""
        return torch.softmax(self.scores(view), dim=-1)

    def init_state(self, batch_size: int) -> RouterState:
        """State before the first token; by default nothing is remembered."""
        return {}

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of the view's positions (B, t, E), given the state before them, and the next.

        Stepping through a text in pieces of any length gives the gates of the full form.

        Raises:
            RoutingError: If the router is not causal.
        """
        if not self.causal:
            raise RoutingError(
                f"Cannot decode with router '{self._title()}': expected a causal router, got one "
                "that reads the whole block. Choose a causal router."
            )
        return self.gates(view), state

    def reorder(self, state: RouterState, index: Tensor) -> RouterState:
        """State whose row b is the old row `index[b]`, for beam search."""
        return {name: tensor.index_select(0, index) for name, tensor in state.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything learned, for safetensors and the constructor."""
        return {name: tensor.detach() for name, tensor in self.named_parameters()}

    @classmethod
    def narrow(cls, options: RouterOptions) -> OptionsT:
        """The options as this router's own.

        Raises:
            RoutingError: If they are another router's.
        """
        if not isinstance(options, cls.Options):
            raise RoutingError(
                f"Cannot use router '{cls._title()}': expected {cls.Options.__name__}, got "
                f"{type(options).__name__}. Build the options with its Options class."
            )
        return options  # type: ignore[return-value]

    @classmethod
    def _title(cls) -> str:
        return cls.name or cls.__name__

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        expected = self.shapes(self.num_experts, self.options)
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        sizes: dict[str, int] = {}

        def fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
            return len(shape) == len(wanted) and all(
                size >= 1
                and size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
                for size, want in zip(shape, wanted, strict=True)
            )

        if got.keys() != expected.keys() or not all(fits(got[n], expected[n]) for n in expected):
            raise ShapeError(
                f"Cannot load router '{self._title()}': expected {_list_shapes(expected)}, got "
                f"{_list_shapes(got)}. Fuse again."
            )


def _list_shapes(shapes: Mapping[str, tuple[int | str, ...]]) -> str:
    listed = (f"{name} ({', '.join(map(str, shape))})" for name, shape in sorted(shapes.items()))
    return ", ".join(listed) or "no tensors"
