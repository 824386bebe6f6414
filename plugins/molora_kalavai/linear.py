"""KALAVAI's linear router on a causal running mean of hidden states, and its published form."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from molora_fed.errors import RoutingError, ShapeError
from molora_fed.routing.causal import causal_mean, causal_sum, count_since_start
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState, RouterView
from molora_fed.routing.fitting import check_calibration, fit_on_batches
from molora_fed.types import Progress, Reading

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["LinearOptions", "LinearRouter", "NoncausalLinearRouter"]


class LinearOptions(RouterOptions):
    """Options of the linear routers.

    Attributes:
        input: Hidden state the gates are computed from.
        steps: AdamW steps.
        batch: Blocks per step.
        learning_rate: Of AdamW, constant.
    """

    input: Literal["mean_hidden", "base_hidden", "prefix_hidden"] = "mean_hidden"
    steps: int = Field(default=500, ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class LinearRouter(OutputRouter):
    """Gates softmax(W m_t), m_t the mean of the document's hidden states up to t.

    Source: arXiv 2603.22755, protocol. Deviations: the mean runs over the document so far, not
    over the whole sequence, so that the gate sees no future token; batches draw domains in turn.
    """

    Options: ClassVar[type[RouterOptions]] = LinearOptions

    def __init__(self, num_experts: int, options: LinearOptions, weight: Tensor) -> None:
        super().__init__(num_experts, options)
        self.input: Reading = options.input
        self.weight = weight  # (E, D)

    @classmethod
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        """The one hidden state of the options."""
        return frozenset({_narrow(options).input})

    @classmethod
    def fit(
        cls,
        bank: "CalibrationBank",
        options: RouterOptions,
        seed: int,
        progress: Progress | None = None,
    ) -> Self:
        """Fit W on the bank; `seed` decides its start and the order of blocks."""
        check_calibration(bank)
        chosen = _narrow(options)
        name: Reading = chosen.input
        features = bank.derive(f"{cls.__name__}:{name}", lambda view: cls._pool(view, name))
        router = cls(bank.num_experts, chosen, _draw_weight(bank, seed))
        fit_on_batches(
            bank,
            features,
            [router.weight],
            router._score,
            steps=chosen.steps,
            batch=chosen.batch,
            learning_rate=chosen.learning_rate,
            seed=seed,
            progress=progress,
        )
        return router

    @staticmethod
    def _pool(view: RouterView, name: Reading) -> Tensor:
        return causal_mean(_read(view, name), view.document_starts)

    def _score(self, pooled: Tensor) -> Tensor:
        return pooled @ self.weight.T.to(pooled.device)

    def scores(self, view: RouterView) -> Tensor:
        """Logits of the gates, (B, T, E)."""
        self._check_width(_read(view, self.input))
        return self._score(self._pool(view, self.input))

    def init_state(self, batch_size: int) -> RouterState:
        """Sum of the document's states, (B, D), and their number, (B,)."""
        device = self.weight.device
        return {
            "sum": torch.zeros(batch_size, self.weight.shape[1], device=device),
            "count": torch.zeros(batch_size, device=device),
        }

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Gates of the next positions, (B, t, E), and the state after them."""
        hidden = _read(view, self.input)
        self._check_width(hidden)
        before = {name: tensor.to(hidden.device) for name, tensor in state.items()}
        total = causal_sum(hidden.float(), view.document_starts, carry=before["sum"])
        count = count_since_start(view.document_starts, carry=before["count"])
        gates = torch.softmax(self._score(total / count.unsqueeze(-1)), dim=-1)
        return gates, {"sum": total[:, -1], "count": count[:, -1]}

    def _check_width(self, hidden: Tensor) -> None:
        if hidden.shape[-1] != self.weight.shape[1]:
            raise ShapeError(
                f"Cannot route with 'linear': expected {self.input} of width "
                f"{self.weight.shape[1]}, got {hidden.shape[-1]}. Use the base it was fitted on."
            )

    def state_tensors(self) -> dict[str, Tensor]:
        """W, (E, D)."""
        return {"weight": self.weight.detach()}

    @classmethod
    def from_state(
        cls, num_experts: int, options: RouterOptions, tensors: Mapping[str, Tensor]
    ) -> Self:
        """The router with this W.

        Raises:
            ShapeError: If W is missing or is not (E, D).
        """
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2 or len(weight) != num_experts:
            got = "nothing" if weight is None else str(tuple(weight.shape))
            raise ShapeError(
                f"Cannot load router 'linear': expected a weight ({num_experts}, D), got {got}. "
                "Fuse again."
            )
        return cls(num_experts, _narrow(options), weight)


class NoncausalLinearRouter(LinearRouter):
    """Gates softmax(W m), m the mean over the whole block: sees the future, cannot generate.

    Source: arXiv 2603.22755, published code; kept for reproduction only.
    """

    causal: ClassVar[bool] = False

    @staticmethod
    def _pool(view: RouterView, name: Reading) -> Tensor:
        hidden = _read(view, name).float()
        return hidden.mean(dim=1, keepdim=True).expand_as(hidden)

    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        """Refused: the gates of a position need the text after it.

        Raises:
            RoutingError: Always.
        """
        raise RoutingError(
            "Cannot decode with router 'linear-noncausal': expected a causal router, got one "
            "that reads the whole block. Use 'linear' or 'evidence'."
        )


def _narrow(options: RouterOptions) -> LinearOptions:
    if not isinstance(options, LinearOptions):
        raise RoutingError(
            f"Cannot use router 'linear': expected LinearOptions, got {type(options).__name__}. "
            "Build the options with its Options class."
        )
    return options


def _read(view: RouterView, name: Reading) -> Tensor:
    column: Tensor | None = getattr(view, name)
    if column is None:
        raise RoutingError(
            f"Cannot route with 'linear': expected a view with {name}, got none. "
            "Build the bank with this reading."
        )
    return column


def _draw_weight(bank: "CalibrationBank", seed: int) -> Tensor:
    """W at the start, (E, D): a row is drawn by its expert's name, so that order never matters."""
    bound = bank.hidden_size**-0.5
    rows = []
    for name in bank.expert_names:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(bank.hidden_size, generator=generator) * 2 * bound - bound)
    return torch.stack(rows).to(bank.device)
