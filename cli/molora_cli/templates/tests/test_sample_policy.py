"""The contract of escalation policies, and what makes this policy this policy."""

from molora_fed import CascadeTask, ProbeEvidence
from molora_fed.testing import check_policy_conformance

from molora_sample_policy.policy import (
    SampleOptions,
    SamplePolicy,
)

TASK = CascadeTask("one", "sums", "2 + 2 =", "number")
DISAGREEING = ProbeEvidence(TASK, ("4", "4", "5"), ("4", "four, so 4", "5"), sigma=0.5)


def test_keeps_the_contract():
    check_policy_conformance(SamplePolicy)
    options = SampleOptions(agreement=0.5)
    check_policy_conformance(SamplePolicy, options)


def test_asks_all_where_samples_disagree_more_than_allowed():
    policy = SamplePolicy(SampleOptions())
    assert policy.choose(DISAGREEING) == "full_arena"


def test_keeps_the_answer_where_they_agree_enough():
    policy = SamplePolicy(SampleOptions(agreement=0.5))
    assert policy.choose(DISAGREEING) == "single_agent"
