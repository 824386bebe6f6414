"""Evidence with a switching rate: the expert that writes a document may change within it."""

from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from molora_fed.bank.views import RouterView
from molora_fed.routing.contract import OutputRouter, RouterOptions, RouterState
from molora_fed.routing.fitting import compute_score_loss, fit_on_whole
from molora_fed.routing.summed import FitSetting
from molora_fed.types import Progress, Reading
from molora_kalavai.evidence import check_evidence, read_relative_evidence
from molora_kalavai.second_order import SecondOrderFit, spread_evenly

if TYPE_CHECKING:
    from molora_fed.bank import CalibrationBank

__all__ = ["FixedShareRouter", "ShareOptions"]

_NAMES = ("rate", "power", "log_prior")
_START_RATE = -5.0  # log-odds: a switch every 150 tokens
_START_POWER = 2.0  # log-odds: evidence counts 0.88 of its face value
_NEVER = 40.0  # log-odds of what always holds, in sums
_STARTS = ((_START_RATE, _START_POWER), (-5.0, 0.0), (-3.0, 2.0), (-3.0, 0.0), (-8.0, 2.0))
"""Log-odds of rate and power at the first points of a fit by sums."""


class ShareOptions(RouterOptions):
    """Options of the fixed-share router.

    Attributes:
        prior: Whether the experts' shares are fitted, which decide at a document's start and
            after a switch; False leaves all experts equal.
        iterations: Largest number of L-BFGS iterations.
    """

    prior: bool = True
    iterations: int = Field(default=40, ge=1)


class FixedShareRouter(OutputRouter[ShareOptions]):
    """Bayes' rule for a writer who changes: a share of all belief goes back to the prior.

    v_t(e) = w_t(e) p_e(x_t)^power, normalised; w_{t+1} = (1 - rate) v_t + rate * prior; gates are
    w. With rate 0, power 1 and a uniform prior it is the zero-training evidence router.

    Source: fixed share, Herbster and Warmuth 1998, shares going to the prior instead of the other
    experts; bound in docs/routers.md.

    Attributes:
        rate: Probability of a switch after each token, () in [0, 1).
        power: How much of its face value evidence counts, () in (0, 1].
        log_prior: (E,), exponentials sum to 1.
    """

    name: ClassVar[str] = "evidence-share"
    readings: ClassVar[frozenset[Reading]] = frozenset({"evidence"})

    @classmethod
    @override
    def shapes(cls, num_experts: int, options: ShareOptions) -> dict[str, tuple[int | str, ...]]:
        return dict(zip(_NAMES, ((), (), (num_experts,)), strict=True))

    @classmethod
    @override
    def learn(
        cls, bank: "CalibrationBank", options: ShareOptions, seed: int, progress: Progress | None
    ) -> Self:
        """Fit on the whole bank, never worse there than the zero form; `seed` has no effect."""
        features = bank.derive(cls.name, _pack)
        rate = torch.tensor(_START_RATE, device=bank.device)
        power = torch.tensor(_START_POWER, device=bank.device)
        prior = torch.zeros(bank.num_experts, device=bank.device)

        def score(packed: Tensor) -> Tensor:
            return _share(
                *_unpack(packed),
                functional.logsigmoid(rate),
                functional.logsigmoid(-rate),
                torch.sigmoid(power),
                torch.log_softmax(prior, dim=-1),
            )[0]

        fit_on_whole(
            # Evidence weighs distributions, and so it is fitted, a vocabulary's width cheaper.
            bank.under_probability_mixture(),
            features,
            [rate, power, prior] if options.prior else [rate, power],
            score,
            iterations=options.iterations,
            progress=progress,
        )
        numbers = (torch.sigmoid(rate), torch.sigmoid(power), torch.log_softmax(prior, dim=-1))
        fitted = cls(bank.num_experts, options, dict(zip(_NAMES, numbers, strict=True)))
        zero = cls._zero(bank.num_experts, options, bank.device)
        return min((fitted, zero), key=lambda r: compute_score_loss(bank, features, r.score_packed))

    @classmethod
    @override
    def by_sums(cls, setting: FitSetting) -> "ShareSums":
        return ShareSums(setting, cls.narrow(setting.options))

    @classmethod
    def _zero(cls, num_experts: int, options: ShareOptions, device: torch.device) -> Self:
        """No switches, evidence at face value, all experts equal."""
        rate, power = torch.zeros((), device=device), torch.ones((), device=device)
        uniform = torch.log_softmax(torch.zeros(num_experts, device=device), dim=-1)
        return cls(num_experts, options, {"rate": rate, "power": power, "log_prior": uniform})

    def score_packed(self, packed: Tensor) -> Tensor:
        """Scores (B, T, E) of what `bank.derive` keeps of a view."""
        return self._run(*_unpack(packed))[0]

    def _run(
        self, evidence: Tensor, starts: Tensor, carry: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rate, power, prior = (
            t.to(evidence.device) for t in (self.rate, self.power, self.log_prior)
        )
        return _share(evidence, starts, rate.log(), torch.log1p(-rate), power, prior, carry)

    @override
    def scores(self, view: RouterView) -> Tensor:
        """Log-probability of each expert writing the next token, (B, T, E)."""
        check_evidence(view, self.num_experts)
        return self._run(read_relative_evidence(view), view.document_starts)[0]

    @override
    def init_state(self, batch_size: int) -> RouterState:
        """Log-probability of each expert writing the next token, (B, E)."""
        return {"belief": self.log_prior.expand(batch_size, -1).clone()}

    @override
    def step(self, view: RouterView, state: RouterState) -> tuple[Tensor, RouterState]:
        check_evidence(view, self.num_experts)
        evidence = read_relative_evidence(view)
        scores, belief = self._run(
            evidence, view.document_starts, state["belief"].to(evidence.device)
        )
        return torch.softmax(scores, dim=-1), {"belief": belief}


class ShareSums(SecondOrderFit[ShareOptions]):
    """Log-odds of rate and power, then the prior, fitted by sums; the zero form if it is better."""

    slope_bound: ClassVar[float] = 1e4

    @override
    def begin(self) -> Tensor:
        """The zero form, and some rates and powers."""
        size = self.setting.num_experts
        points = [(-_NEVER, _NEVER), *_STARTS]
        return torch.tensor([(*point, *([0.0] * size)) for point in points], dtype=torch.float64)

    @override
    def directions(self) -> Tensor:
        prior = spread_evenly(self.setting.num_experts)[:, : None if self.options.prior else 0]
        return torch.block_diag(torch.eye(2, dtype=torch.float64), prior)

    @override
    def features(self, bank: "CalibrationBank") -> Tensor:
        return bank.derive(FixedShareRouter.name, _pack)

    @override
    def score(self, features: Tensor, theta: Tensor) -> Tensor:
        rate, power, prior = theta[0], theta[1], theta[2:]
        return _share(
            *_unpack(features),
            functional.logsigmoid(rate),
            functional.logsigmoid(-rate),
            torch.sigmoid(power),
            torch.log_softmax(prior, dim=-1),
        )[0]

    @override
    def tensors(self, theta: Tensor) -> dict[str, Tensor]:
        rate, power = torch.sigmoid(theta[:2]).float()
        if float(theta[0]) <= -_NEVER:  # the zero form, exactly
            rate, power = torch.zeros(()), torch.ones(())
        log_prior = torch.log_softmax(theta[2:], dim=-1).float()
        return dict(zip(_NAMES, (rate.clone(), power.clone(), log_prior), strict=True))


def _share(
    evidence: Tensor,
    starts: Tensor,
    log_rate: Tensor,
    log_stay: Tensor,
    power: Tensor,
    log_prior: Tensor,
    carry: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-beliefs after each token, (B, T, E), and after the last, (B, E).

    The recursion goes token by token: what is added each time rules out sums by doubling.
    """
    belief = log_prior.expand(len(evidence), -1) if carry is None else carry
    arriving = log_rate + log_prior
    beliefs = []
    for now, start in zip(
        (power * evidence).unbind(dim=1), starts.unsqueeze(-1).unbind(dim=1), strict=True
    ):
        posterior = torch.log_softmax(belief + now, dim=-1)
        belief = torch.logaddexp(posterior + log_stay, arriving.expand_as(posterior))
        belief = torch.where(start, log_prior, belief)
        beliefs.append(belief)
    return torch.stack(beliefs, dim=1), belief


def _pack(view: RouterView) -> Tensor:
    """Relative evidence with document starts as a last column, (B, T, E + 1)."""
    starts = view.document_starts.unsqueeze(-1).float()
    return torch.cat([read_relative_evidence(view), starts], dim=-1)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    return packed[..., :-1], packed[..., -1] > 0
