"""The contract of extractors, and what makes this extractor this extractor."""

from molora_fed import CascadeTask
from molora_fed.testing import check_extractor_conformance

from molora_sample_extractor.extractor import extract

TASK = CascadeTask("one", "colours", "Which colour has the sky?", "sample-extractor")


def test_keeps_the_contract():
    check_extractor_conformance(extract)


def test_takes_the_last_line_that_says_anything():
    assert extract(TASK, "Let me see.\n\n  Light  BLUE\n\n") == "light blue"
    assert extract(TASK, " \n") is None
