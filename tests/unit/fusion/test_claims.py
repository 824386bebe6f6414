"""Members measure one another's adapters; no single one of them can have one left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.fusion.claims import (
    ABSURD_RISE,
    MAX_MEASURERS,
    Claim,
    draw_measurers,
    find_disagreement,
    list_drawn,
)

NAMES = st.sampled_from([f"member-{n}" for n in range(12)])
DOMAINS = st.dictionaries(NAMES, st.sampled_from(["law", "code", "news"]), min_size=1)


@given(DOMAINS)
def test_up_to_three_others_are_drawn_those_of_the_domain_first(domains):
    for whom, domain in domains.items():
        drawn = draw_measurers("f" * 64, domains, whom)
        assert whom not in drawn and len(drawn) == min(MAX_MEASURERS, len(domains) - 1)
        alike = sum(one == domain for one in domains.values()) - 1
        own = [name for name in drawn if domains[name] == domain]
        assert len(own) == min(MAX_MEASURERS, alike)
        for name in domains:
            assert (name in drawn) == (whom in list_drawn("f" * 64, domains, name))


def claim(base, loss):
    return Claim(base=base, loss=loss, clusters=9)


def test_another_fusion_draws_others():
    domains = dict.fromkeys([f"member-{n}" for n in range(12)], "law")
    drawn = {draw_measurers(f"{n}" * 64, domains, "member-0") for n in range(8)}
    assert len(drawn) > 1


@given(st.floats(0.1, 20), st.floats(0.1, 20), st.sampled_from(["law", "code"]))
def test_one_member_alone_never_has_an_adapter_left_out(base, loss, domain):
    bad = {"anna": (domain, claim(base, loss))}
    good = {"bert": ("law", claim(3.0, 2.0)), "carl": ("code", claim(3.0, 3.1))}
    assert find_disagreement("dora", "law", bad) == ""
    assert find_disagreement("dora", "law", {**bad, **good}) == ""


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"anna": ("law", 3.0, 3.1), "bert": ("law", 3.0, 3.0)}, "'anna', 3.000 against 3.000"),
        ({"anna": ("code", 3.0, 7.0), "bert": ("news", 3.0, 6.5)}, f"at most {ABSURD_RISE:g} nats"),
        ({"anna": ("law", 3.0, 3.1), "bert": ("law", 3.0, 2.0), "c": ("law", 3.0, 2.9)}, ""),
        ({"anna": ("code", 3.0, 5.9), "bert": ("news", 3.0, 5.9)}, ""),
    ],
)
def test_two_of_the_drawn_who_agree_do_and_they_are_named(claims, words):
    found = {name: (domain, claim(base, loss)) for name, (domain, base, loss) in claims.items()}
    said = find_disagreement("dora", "law", found)
    assert words in said and bool(words) == bool(said)
