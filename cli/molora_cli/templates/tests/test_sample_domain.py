"""The contract of domains, and what makes this domain this domain."""

from molora_fed.testing import check_domain_conformance

from molora_sample_domain.domain import (
    SampleDomain,
    SampleOptions,
)


def read(**options):
    """Texts by name."""
    domain = SampleDomain(SampleOptions(**options))
    return {document.name: document.text for document in domain()}


def test_keeps_the_contract():
    check_domain_conformance(SampleDomain)


def test_reads_what_python_says_of_its_own_statements():
    assert "while" in read()["while"]


def test_short_documents_are_left_out():
    assert read(shortest=1000).keys() < read().keys()
