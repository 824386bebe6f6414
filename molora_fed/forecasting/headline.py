"""Which forecast a fusion is announced with, or why there is none.

The charter names gain predictors; what each says is in the forecasts, so only names are kept here.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora_fed.options import Choice, list_settings
from molora_fed.plugins import Plugins
from molora_fed.types import Case, Forecast

__all__ = ["Headline", "choose_headline"]

_NEEDS = (
    "losses of every specialist on every domain are needed, and only those on their own are known; "
    "fuse, or before training run pilots (`molora train --steps N`, then `molora forecast "
    "--cooperative FOLDER --pilot FOLDER ...`)"
)


@dataclass(frozen=True)
class Headline:
    """The forecast that stands above the others.

    Attributes:
        predictors: Those of the charter's that made a forecast, in its order.
        reason: Why there is none, without a full stop; empty where there is one.
    """

    predictors: tuple[str, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The form of `report.json`."""
        return {"predictors": list(self.predictors), "reason": self.reason or None}


def choose_headline(
    names: Sequence[str],
    forecasts: Mapping[str, Forecast | None],
    case: Case,
    plugins: Plugins,
    *,
    choices: Iterable[Choice] = (),
) -> Headline:
    """Take the charter's headline predictors that made a forecast.

    Args:
        names: What the charter names as headline.
        forecasts: What predictors said of the case, by name; those without a point count for none.
        case: What was forecast.
        plugins: Where predictors are registered.
        choices: The charter's options of predictors, whose labels may be named, too.

    Returns:
        The headline; if nobody made one, with one sentence on why and what to do.
    """
    made = {n for n, forecast in forecasts.items() if forecast and forecast.point is not None}
    given = tuple(name for name in names if name in made)
    known = {one.key for one in list_settings(plugins.gain_predictors, choices)}
    return Headline(given, "" if given else _explain(names, case, known))


def _explain(names: Sequence[str], case: Case, registered: Collection[str]) -> str:
    missing = [name for name in names if name not in registered]
    losses = case.losses
    if not names:
        return "the charter names no predictor as `headline`"
    if len(missing) == len(names):
        return f"no installed plugin has the predictors {', '.join(missing)}; install one that has"
    if len(set(losses.own_domain.values())) < 2:
        return "specialists of two domains or more are needed; wait for another contributor"
    known = all(set(losses.domains) <= set(row) for row in losses.specialists.values())
    if not known and not case.is_extrapolated:
        return _NEEDS
    return f"{', '.join(names)} know too little of this case; see the forecasts of the others"
