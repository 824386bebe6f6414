"""What a fusion leaves in the ledger: the cooperative's state, what was decided, and forecasts.

The federation's coordinator and `molora fuse` keep the same record.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from molora_fed.contributions.states import CooperativeState
from molora_fed.forecasting.history import read_forecasts
from molora_fed.storage.files import canonical_json

if TYPE_CHECKING:
    from molora_fed.contributions.ledger import Ledger
    from molora_fed.forecasting.records import ForecastRecord

__all__ = ["ForecastKeeper", "begin_fusion", "end_fusion"]

_DECIDED = ("seed", "router", "domains", "guard", "gain_percent", "fingerprints")

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


def end_fusion(ledger: "Ledger", *, actor: str, result: Mapping[str, Any] | None = None) -> None:
    """Move a cooperative whose fused model is there to PUBLISHED, and log what was decided.

    Safe to interrupt: call again with the same result to resume.

    Args:
        ledger: Open for writing.
        actor: Who does this, for the history.
        result: Content of the fusion's `result.json`, or of `evolution.json`; of the latter each
            generation's verdict is logged too. None logs the state alone.
    """
    if result is not None:
        _log_decisions(ledger, result, actor)
    ledger.advance(_S.PUBLISHED, actor=actor)


def _log_decisions(ledger: "Ledger", result: Mapping[str, Any], actor: str) -> None:
    generations = result.get("generations", ())
    decided = {name: result[name] for name in _DECIDED if name in result}
    subject = str(result.get("fingerprints", {}).get("population", result.get("router", "")))
    what = "evolution-decided" if generations else "fusion-decided"
    lines = [("generation-decided", str(one["number"]), dict(one)) for one in generations]
    events = ledger.events()
    began = max((e.number for e in events if e.what == "cooperative-changed"), default=0)
    known = {(e.what, e.subject, canonical_json(e.data)) for e in events if e.number > began}
    for kind, about, data in (*lines, (what, subject, decided)):
        # Tuples become lists, as when read; figures that are not finite become null.
        plain = json.loads(json.dumps(data), parse_constant=lambda name: None)
        if (kind, about, canonical_json(plain)) not in known:
            ledger.add_event(kind, actor=actor, subject=about, data=plain)


class ForecastKeeper:
    """Writes forecasts down before the outcome, and the outcome beside them afterwards.

    Pass it as `on_forecasts` of `molora_fed.fusion.fuse.fuse`.

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
        for waiting, claim in read_forecasts(self._ledger):
            key = (claim.router, claim.forecast.reference)
            is_same = set(claim.losses.domains) == domains
            if waiting.outcome is None and is_same and key in gains:
                self._ledger.score_record(waiting.number, {"actual": gains[key]}, actor=self._actor)
