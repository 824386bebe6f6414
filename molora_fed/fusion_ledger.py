"""What a fusion leaves in the ledger: the cooperative's state, and forecasts before their outcome.

The federation's coordinator and `molora fuse` keep the same record.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from molora_fed.contributions.states import CooperativeState

if TYPE_CHECKING:
    from molora_fed.contributions.ledger import Ledger
    from molora_fed.forecasting.records import ForecastRecord

__all__ = ["ForecastKeeper", "begin_fusion", "end_fusion"]

_S = CooperativeState
_FIRST_FUSION = (_S.RECRUITING, _S.TRAINING, _S.FUSING)


def begin_fusion(ledger: "Ledger", *, actor: str) -> CooperativeState:
    """Move a cooperative to FUSING, or to GROWING if it has published before.

    Where it is there already, because a run was stopped in between, nothing happens.

    Returns:
        The state it is in now.
    """
    before = ledger.cooperative_state
    if before in (_S.PUBLISHED, _S.GROWING):
        ledger.advance(_S.GROWING, actor=actor)
    elif before == _S.CREATED:
        for state in _FIRST_FUSION:
            ledger.advance(state, actor=actor)
    else:
        for state in _FIRST_FUSION[_FIRST_FUSION.index(before) + 1 :]:
            ledger.advance(state, actor=actor)
    return ledger.cooperative_state


def end_fusion(ledger: "Ledger", *, actor: str) -> None:
    """Move a cooperative whose fused model is there to PUBLISHED."""
    ledger.advance(_S.PUBLISHED, actor=actor)


class ForecastKeeper:
    """Writes forecasts down before the outcome, and the outcome beside them afterwards.

    Pass it as `on_forecasts` of `molora_fed.fusion.fuse`.

    Args:
        ledger: Open for writing.
        actor: Who does this, for the history.
    """

    def __init__(self, ledger: "Ledger", *, actor: str) -> None:
        self._ledger = ledger
        self._actor = actor
        self._numbers: dict[str, int] = {}

    def __call__(self, records: "Sequence[ForecastRecord]") -> None:
        """Keep unscored forecasts, or score those kept before.

        With the outcome of a fusion, forecasts that were made before it of the same router and
        domains (from pilots, or from stated losses) are scored too.

        Raises:
            LedgerError: If a forecast is scored twice.
        """
        for record in records:
            name = f"{record.predictor}/{record.router}/{record.forecast.reference}"
            if record.actual is None:
                number = self._ledger.add_record("forecast", record.to_json(), actor=self._actor)
                self._numbers[name] = number
            elif name in self._numbers:
                outcome = {"actual": record.actual}
                self._ledger.score_record(self._numbers[name], outcome, actor=self._actor)
        scored = [record for record in records if record.actual is not None]
        if scored:
            self._score_earlier(scored)

    def _score_earlier(self, scored: "Sequence[ForecastRecord]") -> None:
        """Score what waits for the same outcome."""
        gains = {(r.router, r.forecast.reference): r.actual for r in scored}
        domains = set(scored[0].losses.domains)
        for waiting in self._ledger.records("forecast"):
            claim = waiting.data
            key = (claim["router"], claim["forecast"]["reference"])
            is_same = set(claim["losses"]["domains"]) == domains
            if waiting.outcome is None and is_same and key in gains:
                self._ledger.score_record(waiting.number, {"actual": gains[key]}, actor=self._actor)
