"""Contributors with texts of their own, asked without a network."""

from adaptation_helpers import build_counting_blocks

from molora_fed.charter import (
    Amendment,
    BaseIdentity,
    Charter,
    FusionRules,
    Identity,
    SampleRules,
)
from molora_fed.plugins import load_plugins
from molora_fed.population.private import Member, PrivateData
from molora_fed.population.private_member import PrivateMember
from molora_fed.population.questions import load_answer, load_question, save_answer, save_question
from molora_fed.population.rules import OperatorRules, PopulationRules
from molora_fed.types import Split

PLUGINS = load_plugins()
RULES = PopulationRules(
    data="private",
    generations=2,
    start_steps=4,
    steps=4,
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


class Stage:
    """Members that answer through folders, as if these had travelled."""

    def __init__(self, base, folder, *, members=MEMBERS, rules=RULES):
        self.base, self.folder, self.members, self.rules = base, folder, members, rules
        self.charter = build_charter(base, rules)
        self.asked, self.answers = [], []
        self.people = {
            one.name: PrivateMember(
                base, build_texts(one), self.charter, folder / one.name, threads=1, plugins=PLUGINS
            )
            for one in members
        }

    def ask(self, question, read):
        self.asked.append(question.kind)
        limits = self.charter.identity.adapters
        sent = self.folder / "question"
        save_question(question, self.rules.router, sent)
        found = []
        for one in self.members:
            arrived = load_question(sent, rules=limits, plugins=PLUGINS)
            answer = self.people[one.name].answer(arrived)
            back = self.folder / "answer"
            save_answer(answer, self.rules.router, back)
            answer = load_answer(back, contributor=one.name, rules=limits, plugins=PLUGINS)
            self.answers.append(answer)
            found.append(read(answer))
        return found

    def data(self, **changes):
        chosen = dict(scope=self.rules.scope, rounds=self.rules.rounds)
        return PrivateData(
            self.members, self.ask, router_name=self.rules.router, plugins=PLUGINS,
            **{**chosen, **changes},
        )  # fmt: skip


def share_a_domain():
    """Three members, two of one domain."""
    return (*MEMBERS, Member("3" * 64, "cleo", "down"))
