"""The gain predictor: what a fusion will be worth, before it is done."""

from collections.abc import Sequence

from molora_fed import Case, Configurable, Forecast, Outcome, PluginOptions


class SampleOptions(PluginOptions):
    """Options, set where the charter names the predictor.

    Attributes:
        share: Of the mean divergence, in [0, 1].
    """

    share: float = 0.5


class SamplePredictor(Configurable[SampleOptions]):
    """A share of what specialists gained on their own domains."""

    def __call__(self, case: Case, past: Sequence[Outcome]) -> Forecast | None:
        """Forecast the gain of a fusion: the one method to fill in.

        It is asked before anything is fused, and its forecast is kept and scored afterwards. It
        never raises for want of evidence.

        Args:
            case: `losses` has those that are known, nats per token: of the base by domain, of
                each specialist by domain, its own at least. `pilots` has the same after a small
                share of the training, or is None.
            past: What earlier fusions gained, percent; none of this case's group, often empty.

        Returns:
            Gain in percent against the best that anyone has alone, with an interval and its level
            where one is claimed; None if the predictor does not apply.

        See docs/hooks/gain-predictors.md, and docs/forecasts.md.
        """
        losses = case.losses
        divergences = [
            100 * (losses.base[d] - losses.specialists[name][d]) / losses.base[d]
            for name, d in losses.own_domain.items()
            if losses.base.get(d)
        ]
        if not divergences:
            return None
        share = self.options.share
        return Forecast(
            reference="best_alone",
            point=share * sum(divergences) / len(divergences),
            low=None,
            high=None,
            level=None,
            note=f"{share} of the mean divergence on own domains.",
        )
