"""Contributors with texts of their own, asked without a network."""

from adaptation_helpers import build_counting_blocks

from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    FusionRules,
    Identity,
    OperatorRules,
    PopulationRules,
    SampleRules,
)
from molora_fed.plugins import load_plugins
from molora_fed.population.private import Member, PrivateData
from molora_fed.population.private_member import PrivateMember
from molora_fed.testing.models import Table
from molora_fed.types import Split

PLUGINS = load_plugins()
RULES = PopulationRules(
    data="private",
    generations=2,
    start_steps=8,
    steps=8,
    learning_rate=1e-2,
    rank=2,
    lifecycle=(
        OperatorRules(name="death", options={"threshold": 10.0, "patience": 1, "min_age": 1}),
        OperatorRules(name="inheritance"),
        OperatorRules(name="svd-mutation"),
    ),
)
MEMBERS = (Member("1" * 64, "anna", "up"), Member("2" * 64, "bert", "down"))


def build_charter(base, rules=RULES):
    identity = Identity(
        name="test",
        base=BaseIdentity(id="tiny", weights=base.weights, tokenizer="0" * 64),
    )
    amendment = Amendment(
        fusion=FusionRules(mode="population"),
        population=rules,
        samples=SampleRules(calibration=1_000, held_out=1_000),
        seed=3,
    )
    return Charter(identity=identity, amendment=amendment)


def build_texts(member, count=60):
    """Blocks of a member by split; a name of its own has texts of its own."""
    seed = sum(member.name.encode())
    blocks = build_counting_blocks(member.domain, count=count, seed=seed, split=Split.CALIBRATION)
    held_out = build_counting_blocks(member.domain, count=12, seed=seed + 1, split=Split.HELD_OUT)
    return {Split.CALIBRATION: blocks, Split.HELD_OUT: held_out}


class Stage(Table):
    """Members round a table, with texts of their own."""

    def __init__(self, base, folder, *, members=MEMBERS, rules=RULES):
        self.members, self.rules = members, rules
        self.charter = build_charter(base, rules)
        self.people = {
            one.name: PrivateMember(
                base, build_texts(one), self.charter, folder / one.name, threads=1, plugins=PLUGINS
            )
            for one in members
        }
        super().__init__(folder, self.people, self.charter, PLUGINS)

    def data(self, **changes):
        chosen = dict(scope=self.rules.scope, rounds=self.rules.rounds)
        return PrivateData(
            self.members, self, router_name=self.rules.router, plugins=PLUGINS,
            **{**chosen, **changes},
        )  # fmt: skip


def share_a_domain():
    """Three members, two of one domain."""
    return (*MEMBERS, Member("3" * 64, "cleo", "down"))
