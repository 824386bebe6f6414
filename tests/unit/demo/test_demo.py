from pathlib import Path

import numpy as np
import pytest

from molora_fed.corpus.blocks import Blocks
from molora_fed.demo.report import choose_prompt
from molora_fed.demo.run import DemoOptions, PhaseClock, plan_contributors, run_demo
from molora_fed.errors import ConfigError, UnknownNameError
from molora_fed.federation.status import FederationEvent
from molora_fed.plugins import load_plugins
from molora_fed.storage.values import count_cores
from molora_fed.testing import build_tiny_tokenizer
from molora_fed.types import Split


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


def plan(plugins, **options):
    return plan_contributors(DemoOptions(**options), plugins)


def test_one_contributor_a_domain_by_default(plugins):
    members = plan(plugins)
    assert [member.settings.name for member in members] == ["cpp", "python", "readme", "science"]
    assert {member.settings.shard for member in members} == {(0, 1)}
    assert {member.settings.threads for member in members} == {max(1, count_cores() // 4)}
    assert len({member.home for member in members}) == 4


def test_more_contributors_than_domains_share_them_disjointly(plugins):
    members = plan(plugins, domains=("python", "science"), contributors=5)
    assert [(m.settings.name, m.settings.domain, m.settings.shard) for m in members] == [
        ("python-1", "python", (0, 3)),
        ("science-1", "science", (0, 2)),
        ("python-2", "python", (1, 3)),
        ("science-2", "science", (1, 2)),
        ("python-3", "python", (2, 3)),
    ]


def test_own_data_without_domains_takes_part_alone(plugins, tmp_path):
    members = plan(plugins, data={"legal": [tmp_path], "notes": [tmp_path]})
    assert [(m.settings.domain, m.settings.data) for m in members] == [
        ("legal", (tmp_path,)),
        ("notes", (tmp_path,)),
    ]
    members = plan(plugins, domains=("cpp",), data={"legal": [tmp_path]})
    assert [m.settings.domain for m in members] == ["cpp", "legal"]


def test_contradictory_options_are_refused_before_anything_is_made(plugins, tmp_path):
    cases = (
        ({"contributors": 3}, ConfigError, "expected at least 4 contributors"),
        ({"domains": ("cpp",)}, ConfigError, "expected at least 2 contributors"),
        ({"domains": ("cpp", "python")}, ConfigError, "expected 3 contributors or more, for no"),
        ({"control": True}, ConfigError, "expected --privacy pooled"),
        ({"domains": ("cpp",), "data": {"cpp": [tmp_path]}}, ConfigError, "each domain once"),
        ({"domains": ("pyton", "cpp")}, UnknownNameError, "Did you mean 'python'"),
    )
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            run_demo(DemoOptions(**options, out=tmp_path / "out"), plugins=plugins)
    assert not (tmp_path / "out").exists()


def test_the_slowest_contributor_decides_the_phase():
    clock = PhaseClock(["a", "b"])
    seen = []
    for event in (
        FederationEvent("STARTING"),
        FederationEvent("CORPUS", contributor="a"),
        FederationEvent("CORPUS", contributor="b"),
        FederationEvent("TRAINING", contributor="a"),
        FederationEvent("TRAINING", message="the run went silent", problem=True),
        FederationEvent("TRAINING", contributor="b"),
        FederationEvent("JOINING", contributor="b", message="started again", problem=True),
        FederationEvent("SUBMITTED", contributor="a"),
        FederationEvent("SUBMITTED", contributor="b"),
        FederationEvent("TRAINING", message="2 of 2 contributions admitted"),
        FederationEvent("FUSING", message="calibration-bank"),
        FederationEvent("FUSING", message="2 of 2 contributions admitted"),
        FederationEvent("FUSING", message="routers"),
        FederationEvent("ADMITTED", contributor="a"),
        FederationEvent("PUBLISHED", message="2 contributions fused"),
        FederationEvent("DONE", contributor="a"),
        FederationEvent("STOPPED", contributor="a"),
        FederationEvent("STOPPED"),
    ):
        clock.observe(event)
        seen.append(clock.phase)
    assert list(dict.fromkeys(seen)) == [
        "starting", "corpus", "training", "admission", "calibration-bank", "routers", "delivery",
    ]  # fmt: skip
    clock.enter("")
    assert set(clock.seconds) == set(seen)
    assert all(seconds >= 0 for seconds in clock.seconds.values())


def make_blocks(text: str, starts: list[int]) -> Blocks:
    tokens = np.array([build_tiny_tokenizer().encode(text)], dtype=np.int32)
    documents = np.zeros_like(tokens)
    for start in starts:
        documents[0, start:] += 1
    return Blocks("d", Split.HELD_OUT, tokens, documents, np.zeros_like(tokens))


def test_a_prompt_is_the_beginning_of_a_document():
    text = "the end of one." + "A new one that is long enough to be one." + "x"
    blocks = make_blocks(text, [15, 55])
    assert choose_prompt(blocks, build_tiny_tokenizer()) == "A new one that is long e"


def test_without_a_long_document_the_first_tokens_do():
    blocks = make_blocks("abcdefghijklmnopqrstuvwxyz0123", [10, 20])
    assert choose_prompt(blocks, build_tiny_tokenizer()) == "abcdefghijklmnopqrstuvwx"


def test_no_path_of_a_demo_leaves_its_folder(plugins):
    out = Path("somewhere")
    assert all(m.home.is_relative_to(out) for m in plan(plugins, out=out))
