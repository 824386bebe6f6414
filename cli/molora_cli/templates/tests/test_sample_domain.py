"""The contract of domains, and what makes this domain this domain."""

from molora_fed.testing import check_domain_conformance

from molora_sample_domain.domain import read


def test_keeps_the_contract():
    check_domain_conformance(read)


def test_reads_what_python_says_of_its_own_statements():
    texts = {document.name: document.text for document in read()}
    assert "while" in texts["while"]
