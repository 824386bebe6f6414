"""The contract of judges, and what makes this judge this judge."""

import pytest
from molora_fed import CascadeTask, JudgeRequest
from molora_fed.cascade.contract import Candidate
from molora_fed.errors import ConfigError
from molora_fed.testing import check_judge_conformance

from molora_sample_judge.judge import judge

TASK = CascadeTask("one", "colours", "Which colour has the sky?", "normalised-text")


def ask(*texts, **options):
    """What it decides on candidates that said this; an empty text has no answer."""
    candidates = tuple(Candidate(f"m{i}", text or None, text) for i, text in enumerate(texts))
    return judge(JudgeRequest(TASK, candidates, {}, seed=0, options=options))


def test_keeps_the_contract():
    check_judge_conformance(judge)


def test_the_shortest_text_with_an_answer_wins():
    assert ask("light blue", "blue", "").chosen == 1
    assert ask("", "").chosen == 0


def test_refuses_options_it_does_not_know():
    with pytest.raises(ConfigError, match="louder"):
        ask("blue", louder=True)
