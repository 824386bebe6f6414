"""One expert per document, chosen by a domain classifier once some of the document was read."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.evaluation.evaluate import compute_domain_losses
from molora_fed.routing.causal import causal_sum, count_since_start
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.types import Progress, Reading
from molora_kalavai.hidden import HiddenRouter, pool_causally, read_hidden

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["DispatchOptions", "DispatchRouter"]

_UNSEEN = -1e4  # log-odds of a domain that no calibration document shows: never chosen


class DispatchOptions(RouterOptions):
    """Options of the dispatch router.

    Attributes:
        input: Hidden state the classifier reads; both are known before any expert runs.
        read_tokens: n; the expert is chosen after a document's n-th token and stays.
        penalty: On half the squared weights of the classifier, its inputs standardised.
        iterations: Largest number of L-BFGS iterations.
    """

    input: Literal["base_hidden", "prefix_hidden"] = "base_hidden"
    read_tokens: int = Field(default=32, ge=1)
    penalty: float = Field(default=0.01, gt=0)
    iterations: int = Field(default=200, ge=1)


class DispatchRouter(OutputRouter[DispatchOptions]):
    """One expert a document: the lowest expected loss under the classifier's domains.

    P(d | m_n) is a logistic regression on the mean m_n of the document's first n hidden states;
    the expert is argmin_e sum_d P(d | m_n) L(d, e), L the calibration losses of every expert alone.
    Before the n-th token, P is uniform: the expert that is best on all domains together.

    Source: arXiv 2603.22755 (single-specialist dispatch). Deviations: the classifier reads the
    document's first n tokens only, and chooses by expected loss.
    """

    name: ClassVar[str] = "dispatch"

    @classmethod
    @override
    def reads(cls, options: RouterOptions) -> frozenset[Reading]:
        return frozenset({cls.narrow(options).input})

    @classmethod
    @override
    def shapes(cls, num_experts: int, options: DispatchOptions) -> dict[str, tuple[int | str, ...]]:
        """The classifier, (C, D) and (C,), and the losses it weighs, (C, E)."""
        return {"weight": ("C", "D"), "bias": ("C",), "losses": ("C", num_experts)}

    @classmethod
    @override
    def learn(
        cls,
        bank: "CalibrationBank",
        options: DispatchOptions,
        seed: int,
        progress: Progress | None,
    ) -> Self:
        """Fit the classifier on documents of at least n tokens; `seed` has no effect."""
        samples, domain_of = _collect_samples(bank, options)
        weight, bias = _fit_classifier(samples, domain_of, len(bank.domains), options)
        tables = [compute_domain_losses(bank, bank.expert_nll(e)) for e in range(bank.num_experts)]
        losses = torch.tensor([[table[domain] for table in tables] for domain in bank.domains])
        tensors = {
            "weight": torch.from_numpy(weight).float(),
            "bias": torch.from_numpy(bias).float(),
            "losses": losses,
        }
        on_device = {name: tensor.to(bank.device) for name, tensor in tensors.items()}
        return cls(bank.num_experts, options, on_device)

    @override
    def scores(self, view: RouterView) -> Tensor:
        """Minus the expected loss of every expert, (B, T, E)."""
        return self._advance(view, self.init_state(len(view.document_starts)))[0]

    @override
    def gates(self, view: RouterView) -> Tensor:
        """1 for the chosen expert, 0 for the others, (B, T, E)."""
        return _choose(self.scores(view))

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Sum (B, D) and number (B,) of the document's states; scores held since n, (B, E)."""
        device = self.weight.device
        return {
            "sum": torch.zeros(batch_size, self.weight.shape[1], device=device),
            "count": torch.zeros(batch_size, device=device),
            "held": torch.zeros(batch_size, self.num_experts, device=device),
        }

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        scores, state = self._advance(view, state)
        return _choose(scores), state

    def _advance(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        hidden = read_hidden(view, self.options.input, self.name, self.weight.shape[1])
        device = hidden.device
        weight, bias, losses = (t.to(device) for t in (self.weight, self.bias, self.losses))
        count = count_since_start(view.document_starts, carry=state["count"].to(device))
        mean, after = pool_causally(hidden, view, state)
        posterior = torch.softmax(mean @ weight.T + bias, dim=-1)
        deciding = (count == self.options.read_tokens).unsqueeze(-1)
        # One position of a document is not 0, so its sum from there on is what was decided there.
        decided = torch.where(deciding, -(posterior @ losses), 0.0)
        held = causal_sum(decided, view.document_starts, carry=state["held"].to(device))
        has_decided = (count >= self.options.read_tokens).unsqueeze(-1)
        scores = torch.where(has_decided, held, -losses.mean(dim=0))
        return scores, {**after, "held": held[:, -1]}


def _choose(scores: Tensor) -> Tensor:
    """1 for the highest score, 0 for the others, (..., E)."""
    best = scores.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


def _collect_samples(
    bank: "CalibrationBank", chosen: DispatchOptions
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """m_n of every document part of n tokens or more, (S, D), and their domains, (S,)."""
    name: Reading = chosen.input
    pooled = bank.derive(
        f"{HiddenRouter.pooling}:{name}",
        lambda view: HiddenRouter.pool(read_hidden(view, name, "dispatch"), view),
    )
    deciding = count_since_start(bank.document_starts.cpu()) == chosen.read_tokens
    rows, positions = deciding.nonzero(as_tuple=True)
    return pooled[rows, positions].double().numpy(), bank.domain_of[rows.numpy()]


def _fit_classifier(
    samples: NDArray[np.float64],
    domain_of: NDArray[np.int64],
    num_domains: int,
    chosen: DispatchOptions,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logistic regression, every domain of equal weight.

    Args:
        samples: Inputs, (S, D).
        domain_of: Domain index of each, (S,).
        num_domains: C.
        chosen: Penalty and iterations.

    Returns:
        Weight (C, D) and bias (C,) on inputs as they are; domains without a sample are never
        chosen, and without any sample all are equal.
    """
    counts = np.bincount(domain_of, minlength=num_domains)
    seen = np.flatnonzero(counts)
    weight, bias = np.zeros((num_domains, samples.shape[1])), np.zeros(num_domains)
    if len(seen) == 0:
        return weight, bias
    bias[counts == 0] = _UNSEEN
    mean, scale = samples.mean(axis=0), samples.std(axis=0)
    scale[scale == 0] = 1.0
    inputs = (samples - mean) / scale
    targets = (domain_of[:, None] == seen).astype(np.float64)
    shares = 1.0 / (counts[domain_of] * len(seen))

    def compute_loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        table = flat.reshape(len(seen), -1)  # the last column is the bias
        log_posterior = log_softmax(inputs @ table[:, :-1].T + table[:, -1], axis=1)
        loss = -(shares @ (log_posterior * targets).sum(axis=1))
        error = (np.exp(log_posterior) - targets) * shares[:, None]
        gradient = np.column_stack([error.T @ inputs, error.sum(axis=0)])
        gradient[:, :-1] += chosen.penalty * table[:, :-1]
        return loss + 0.5 * chosen.penalty * float((table[:, :-1] ** 2).sum()), gradient.ravel()

    start = np.zeros(len(seen) * (samples.shape[1] + 1))
    found = minimize(
        compute_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": chosen.iterations}
    )
    table = found.x.reshape(len(seen), -1)
    weight[seen] = table[:, :-1] / scale
    bias[seen] = table[:, -1] - weight[seen] @ mean
    return weight, bias
