"""Narrow domains: every one is there, large enough for twenty contributors, and its own."""

import pytest

from molora_fed.corpus import builtin
from molora_fed.corpus import builtin as areas
from molora_fed.corpus.builtin import AREA_CHARACTERS, read_header_family, read_library_area
from molora_fed.errors import CorpusError
from molora_fed.plugins import load_plugins

QUICK = ("library-concurrency", "library-network", "library-tools", "headers-c10", "headers-python")


@pytest.fixture(scope="module")
def domains():
    return load_plugins().domains


@pytest.mark.parametrize("domain", QUICK)
def test_an_area_is_read_the_same_way_twice(domains, domain):
    read = domains.resolve(domain)
    found = list(read())
    assert list(read()) == found
    assert len({document.name for document in found}) == len(found) >= 20
    assert 300_000 < sum(len(document.text) for document in found) < 1.2 * AREA_CHARACTERS


def test_areas_of_the_library_share_no_file(domains):
    names = [document.name for domain in QUICK[:3] for document in domains.resolve(domain)()]
    assert len(set(names)) == len(names)


def test_docstrings_are_of_their_package_alone(domains):
    found = list(domains.resolve("docstrings-networkx")())
    assert found and all(document.name.startswith("networkx/") for document in found)
    assert not any("/tests/" in document.name for document in found)


def test_headers_of_torch_come_without_the_guard_of_its_wheels(domains):
    found = list(domains.resolve("headers-c10")())
    assert not any("TORCH_STABLE_ONLY" in d.text.splitlines()[0] for d in found)


def test_absent_text_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda *_: str(tmp_path))
    for read, domain in (
        (lambda: read_library_area("queues", ("queue.py",)), "library-queues"),
        (lambda: read_header_family("none", tmp_path / "none"), "headers-none"),
        (lambda: areas.read_package_docstrings("nothing"), "docstrings-nothing"),
    ):
        with pytest.raises(CorpusError, match=f"Cannot read domain '{domain}': expected text in"):
            read()
