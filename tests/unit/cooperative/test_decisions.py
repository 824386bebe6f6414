import pytest

from molora_fed.charter import CorpusRules
from molora_fed.contributions.states import CooperativeState as State
from molora_fed.cooperative.create import found_cooperative
from molora_fed.cooperative.decisions import (
    ForecastKeeper,
    _log_decisions,
    begin_fusion,
    end_fusion,
)
from molora_fed.errors import LedgerError
from molora_fed.forecasting.records import ForecastRecord
from molora_fed.types import Forecast, LossMatrix


@pytest.fixture
def ledger(tmp_path, tiny_checkpoint):
    cooperative, _ = found_cooperative(
        tmp_path / "c", "one", source=str(tiny_checkpoint()), corpus=CorpusRules(block_size=32)
    )
    with cooperative.open_ledger() as opened:
        yield opened


@pytest.mark.parametrize("before", [(), (State.RECRUITING,), (State.RECRUITING, State.TRAINING)])
def test_first_fusion_passes_every_state_and_later_ones_grow(ledger, before):
    for state in before:
        ledger.advance(state, actor="test")
    assert begin_fusion(ledger, actor="test") == State.FUSING
    assert begin_fusion(ledger, actor="test") == State.FUSING  # stopped in between
    end_fusion(ledger, actor="test")
    assert ledger.cooperative_state == State.PUBLISHED
    assert begin_fusion(ledger, actor="test") == State.GROWING
    assert begin_fusion(ledger, actor="test") == State.GROWING
    end_fusion(ledger, actor="test")
    assert ledger.cooperative_state == State.PUBLISHED


def test_what_was_decided_is_logged_once_and_generations_each(ledger):
    result = {
        "router": "gated",
        "fingerprints": {"population": "ab", "contributions": {"a": "01"}},
        "generations": [{"number": n, "kept": bool(n), "newborns": (1,)} for n in range(2)],
        "seconds": {"whole": 1.0},
    }
    begin_fusion(ledger, actor="test")
    end_fusion(ledger, actor="test", result=result)
    begin_fusion(ledger, actor="test")
    for _ in range(2):  # stopped before the state was changed, and called again
        _log_decisions(ledger, result, "test")
    end_fusion(ledger, actor="test", result=result)
    decided = [(e.what, e.subject) for e in ledger.events() if e.what.endswith("-decided")]
    one = [("generation-decided", "0"), ("generation-decided", "1"), ("evolution-decided", "ab")]
    assert decided == one * 2
    assert ledger.events()[-2].data == {
        "router": "gated",
        "fingerprints": result["fingerprints"],
    }


def test_forecasts_are_kept_before_and_scored_once(ledger):
    matrix = LossMatrix(("law",), {"law": 3.0}, {"a": {"law": 2.0}}, {"a": "law"})
    claim = Forecast("best_alone", 1.0, 0.5, 1.5, 0.8, "made up")
    record = ForecastRecord("own-loss", "test 1", "evidence", claim, matrix, "2026-01-01T00:00:00Z")
    keep = ForecastKeeper(ledger, actor="test")
    keep([record])
    [kept] = ledger.records("forecast")
    assert kept.outcome is None
    keep([record.score(1.25)])
    [kept] = ledger.records("forecast")
    assert kept.outcome == {"actual": 1.25}
    with pytest.raises(LedgerError):
        keep([record.score(1.5)])
