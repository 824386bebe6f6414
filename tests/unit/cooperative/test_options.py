"""One charter with labels and options of every kind: what is admitted, fused and evolved."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from fusion_helpers import build_charter, build_cooperative
from growing_helpers import contribute, found
from rich.console import Console

from molora_fed import Configurable, Finding, Fitness, Forecast, PluginOptions, hookimpl
from molora_fed.charter import Amendment, CorpusRules, PrivacyRules, TrainingRules
from molora_fed.cooperative.amend import amend_by_settings
from molora_fed.cooperative.contribute import (
    make_contribution,
    open_charter_and_base,
    prepare_domain,
)
from molora_fed.cooperative.cooperative import create_cooperative, open_cooperative
from molora_fed.cooperative.create import _choose_domains
from molora_fed.cooperative.evolve import evolve_cooperative
from molora_fed.cooperative.fuse import fuse_contributions
from molora_fed.cooperative.outgoing import describe_outgoing
from molora_fed.cooperative.public_text import keep_public_text
from molora_fed.cooperative.publish import measure_statistics
from molora_fed.corpus.builtin import DEFAULT_DOMAINS
from molora_fed.corpus.documents import open_domain
from molora_fed.corpus.prepare import load_report
from molora_fed.errors import CharterError, ConfigError, TrainingError
from molora_fed.fusion.fuse import fuse, fuse_texts
from molora_fed.fusion.local_members import LocalMembers, drop_text
from molora_fed.fusion.plan import check_published_router
from molora_fed.fusion.private_texts import PrivateTexts
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.population.fitness import compute_effects
from molora_fed.population.lineage import read_lineage
from molora_fed.reporting.summary import build_summary
from molora_fed.storage.keys import load_or_make_key
from molora_fed.testing.cooperatives import SAMPLES
from molora_fed.types import Document

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "report.schema.json").read_text())


class ScaleOptions(PluginOptions):
    scale: float


class ScaledMerge(Configurable[ScaleOptions]):
    name = "scaled"

    def __call__(self, adapters, *, name, seed):
        first = adapters[0]
        updates = {
            module: replace(update, scale=update.scale * self.options.scale)
            for module, update in first.updates.items()
            if hasattr(update, "scale")
        }
        return replace(first, updates=updates)


class ConstantOptions(PluginOptions):
    gain: float = 0.0


class Constant(Configurable[ConstantOptions]):
    def __call__(self, case, past):
        return Forecast("best_alone", self.options.gain, None, None, None, "A number.")


class WordOptions(PluginOptions):
    word: str


class SaysWord(Configurable[WordOptions]):
    def __call__(self, candidate):
        text = f"{self.options.word} of {candidate.contribution.manifest.domain}"
        return Finding("nothing", text, "Read it.", is_note=True)


class PortionOptions(PluginOptions):
    portion: float = 1.0


class Portion(Configurable[PortionOptions]):
    def __call__(self, table):
        effects = compute_effects(table)
        values = self.options.portion * effects.total
        errors = self.options.portion * effects.total_errors
        return Fitness("portion", values, errors, effects.by_domain, effects.regret)


class CountOptions(PluginOptions):
    count: int = 2


class Counting(Configurable[CountOptions]):
    def __call__(self):
        draw = random.Random(0)
        for number in range(self.options.count):
            words = (draw.choice("abcd") * 2 + str(draw.randrange(10)) for _ in range(12))
            yield Document(f"{number}.txt", " ".join(words))


class StrictOptions(PluginOptions):
    folder: str


class Strict(Configurable[StrictOptions]):
    def __call__(self):
        return iter(())


class Mine:
    """A plugin with a target that has options for every hook whose targets are called."""

    @staticmethod
    def _add(register, name, target):
        register(name, target, summary="For tests", source="test")

    @hookimpl
    def register_merges(self, register):
        self._add(register, "scaled", ScaledMerge)

    @hookimpl
    def register_gain_predictors(self, register):
        self._add(register, "constant", Constant)

    @hookimpl
    def register_admission_checks(self, register):
        self._add(register, "says-word", SaysWord)

    @hookimpl
    def register_fitness_scopes(self, register):
        self._add(register, "portion", Portion)

    @hookimpl
    def register_domains(self, register):
        self._add(register, "counting", Counting)
        self._add(register, "strict", Strict)


SETTINGS = (
    'fusion.compare=["evidence-zero", {name = "linear", options = {steps = 20}}, '
    '{name = "linear", label = "linear-short", options = {steps = 1}}]',
    'fusion.merges=["average", {name = "scaled", label = "scaled-half", options = {scale = 0.5}}]',
    'fusion.predictors=[{name = "constant", options = {gain = 2.0}}, '
    '{name = "constant", label = "constant-high", options = {gain = 9.0}}]',
    'fusion.headline=["constant-high"]',
    'admission.checks=[{name = "says-word", label = "says-more", options = {word = "more"}}]',
    'population.scope={name = "portion", label = "portion-half", options = {portion = 0.5}}',
)


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([("mine (molora-mine 0.1.0)", Mine())])


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def fused(base, plugins, tmp_path_factory):
    """A cooperative under such a charter, its contributions admitted and fused."""
    root = tmp_path_factory.mktemp("options")
    cooperative, _ = amend_by_settings(found(root / "coop", base), SETTINGS, plugins=plugins)
    folders = [
        contribute(cooperative, base, root, name, seed=seed)
        for seed, name in enumerate(("law-1", "art-1", "law-2"), start=1)
    ]
    return cooperative, fuse_contributions(cooperative, folders, out=root / "out", plugins=plugins)


def test_a_charter_keeps_labels_and_options(fused):
    cooperative, _ = fused
    assert open_cooperative(cooperative.folder) == cooperative
    text = (cooperative.folder / "cooperative.toml").read_text()
    assert '"evidence-zero"' in text and 'label = "linear-short"' in text
    fusion = cooperative.charter.amendment.fusion
    assert list(fusion.routers) == ["evidence-mixed", "evidence-zero", "linear", "linear-short"]
    assert fusion.model_dump(mode="json")["merges"][0] == "average"


def test_two_settings_of_one_plugin_are_fused_side_by_side(fused):
    _, made = fused
    result = made.result.result
    losses = result["losses"]
    assert losses["fused"].keys() == {"evidence-mixed", "evidence-zero", "linear", "linear-short"}
    assert losses["fused"]["linear"] != losses["fused"]["linear-short"]
    assert losses["scaled-half"] != losses["weight_average"]
    points = {name: one["point"] for name, one in result["forecasts"].items()}
    assert (points["constant"], points["constant-high"]) == (2.0, 9.0)
    assert result["headline"]["predictors"] == ["constant-high"]
    assert result["settings"] == {
        "router": {
            "linear": {"name": "linear", "options": {"steps": 20}},
            "linear-short": {"name": "linear", "options": {"steps": 1}},
        },
        "merge": {"scaled-half": {"name": "scaled", "options": {"scale": 0.5}}},
        "gain predictor": {
            "constant": {"name": "constant", "options": {"gain": 2.0}},
            "constant-high": {"name": "constant", "options": {"gain": 9.0}},
        },
    }
    assert [one["name"] for one in result["plugins"]["router"]].count("linear") == 1
    mine = {"name": "scaled", "plugin": "molora-mine", "version": "0.1.0"}
    assert mine in result["plugins"]["merge"]
    assert not [kind for kind in result["not_measured"] if kind in ("router", "merge")]


def test_the_report_says_what_was_chosen(fused):
    _, made = fused
    page = made.report.read_text()
    assert "fused, linear-short" in page and "scaled-half" in page and "constant-high" in page
    assert "router linear-short (linear, steps = 1)" in page
    console = Console(width=200, file=io.StringIO())
    console.print(build_summary(made.result.result))
    printed = console.file.getvalue()
    assert "Options: merge scaled-half (scaled, scale = 0.5)" in printed


def test_a_check_with_options_judges_by_its_label(fused):
    cooperative, _ = fused
    with cooperative.read_ledger() as ledger:
        decisions = [one.decision for one in ledger.contributions()]
    assert len(decisions) == 3
    for decision in decisions:
        assert "says-more" in decision["checks"] and "says-word" not in decision["checks"]
        (note,) = (text for text in decision["notes"] if "more of" in text)
        assert note.startswith("says-more: expected nothing")


def test_a_scope_with_options_measures_by_its_label(fused, plugins):
    cooperative, _ = fused
    settings = (
        "fusion.mode=population", "population.generations=1", "population.start_steps=1",
        "population.steps=1", "population.rank=2", "population.guard=off",
        'population.lifecycle=[{name = "death"}]',
    )  # fmt: skip
    cooperative, _ = amend_by_settings(cooperative, settings, plugins=plugins)
    evolved, page = evolve_cooperative(cooperative, plugins=plugins)
    assert evolved.result["population"]["scope"]["options"] == {"portion": 0.5}
    assert "fitness scope portion-half (portion, portion = 0.5)" in page.read_text()
    measured = read_lineage(evolved.folder / "lineage.jsonl").measurements
    assert {one.scope for one in measured} == {"portion-half"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (['fusion.compare=[{name = "linear", options = {stepz = 1}}]'], ["linear", "stepz"]),
        (
            [
                'fusion.merges=[{name = "average", options = {x = 1}}, "scaled"]',
                'fusion.predictors=[{name = "constant", options = {gain = "much"}}]',
                'admission.checks=[{name = "says-word", label = "w", options = {wort = "a"}}]',
            ],
            ["merge 'average'", "got x", "'scaled'", "scale: Field required", "gain", "wort"],
        ),
        (['fusion.compare=["linear", {name = "linear", options = {steps = 1}}]'], ["several"]),
        (['fusion.compare=["linear", {name = "evidence", label = "linear"}]'], ["several"]),
        (
            ['fusion.compare=[{name = "evidence", label = "linear"}, '
             '{name = "linear", label = "other"}]'],
            ["the label 'linear', a name that is used"],
        ),
        (['fusion.compare=[{name = "linear", label = "evidence-zero"}]'], ["fallback"]),
        (['fusion.compare=[{name = "linear", label = "No Label"}]'], ["fusion.compare.0.label"]),
        (['fusion.merges=[{name = "scaled", label = "base", options = {scale = 1.0}}]'], ["base"]),
        (
            ['fusion.predictors=[{name = "constant", label = "measured-alone"}]'],
            ["measured-alone of predictors"],
        ),
        (
            ['admission.checks=[{name = "says-word", label = "signature", '
             'options = {word = "x"}}]'],
            ["signature"],
        ),
        (
            ["fusion.mode=population", 'population.scope={name = "portion", options = {p = 1}}'],
            ["fitness scope 'portion'", "got p"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart_or_is_unknown_is_not_signed(
    base, plugins, tmp_path, settings, named
):
    cooperative = found(tmp_path / "coop", base)
    with pytest.raises(CharterError) as caught:
        amend_by_settings(cooperative, settings, plugins=plugins)
    assert all(text in str(caught.value) for text in named), str(caught.value)
    assert "\n" not in str(caught.value)
    assert open_cooperative(cooperative.folder) == cooperative


def test_a_domain_reads_with_its_options(plugins):
    assert len(list(open_domain("counting", plugins)())) == 2
    assert len(list(open_domain("counting", plugins, {"count": 3})())) == 3
    with pytest.raises(ConfigError, match=r"domain 'counting'.*cound.*--domain-option"):
        open_domain("counting", plugins, {"cound": 3})
    with pytest.raises(ConfigError, match=r"among the keys none, got field"):
        open_domain("python", plugins, {"field": "x"})


def fuse_privately(base, charter, contributions, folder, plugins):
    experts = [drop_text(one) for one in contributions]
    members = LocalMembers.open(base, charter, contributions, experts, folder, plugins=plugins)
    texts = PrivateTexts(experts, members)
    return fuse_texts(base, charter, texts, folder / "coordinator", plugins=plugins).result


def test_members_at_home_measure_by_labels(tiny_checkpoint, plugins, tmp_path):
    """Routers fitted by sums and merges have the labels of the charter, as on pooled text."""
    base, contributions = build_cooperative(tiny_checkpoint(), tmp_path / "adapters")
    pooled = build_charter(
        base,
        router="evidence",
        compare=(
            {"name": "evidence", "label": "evidence-plain", "options": {"decays": [1.0]}},
            {"name": "evidence-zero", "label": "nothing-fitted"},
        ),
        merges=({"name": "scaled", "label": "scaled-half", "options": {"scale": 0.5}},),
        predictors=({"name": "constant", "options": {"gain": 2.0}},),
    )
    private = pooled.identity.model_copy(update={"privacy_mode": "private"})
    charter = pooled.model_copy(update={"identity": private})
    mine = fuse_privately(base, charter, contributions, tmp_path / "private", plugins)
    theirs = fuse(base, pooled, contributions, tmp_path / "pooled", plugins=plugins).result
    jsonschema.validate(mine, SCHEMA)
    losses = mine["losses"]["fused"]
    assert losses.keys() == {"evidence", "evidence-plain", "evidence-zero", "nothing-fitted"}
    assert losses["nothing-fitted"] == pytest.approx(losses["evidence-zero"], abs=1e-9)
    for router, found_losses in theirs["losses"]["fused"].items():
        assert losses[router] == pytest.approx(found_losses, abs=1e-3), router
    assert mine["losses"]["scaled-half"] == pytest.approx(theirs["losses"]["scaled-half"], abs=1e-5)
    assert mine["forecasts"]["constant"]["point"] == 2.0
    assert mine["settings"] == theirs["settings"]
    told = describe_outgoing(charter, plugins, width=32).told
    assert (
        "Router 'evidence-plain', which is 'evidence', has the charter's options "
        '{"decays":[1.0]}.' in told
    )


def test_routers_of_published_statistics_have_labels(tiny_checkpoint, plugins, tmp_path):
    base, contributions = build_cooperative(tiny_checkpoint(), tmp_path / "adapters")
    pooled = build_charter(
        base, router="statistics", compare=({"name": "evidence-zero", "label": "nothing-fitted"},)
    )
    published = pooled.identity.model_copy(update={"privacy_mode": "statistics"})
    charter = pooled.model_copy(update={"identity": published})
    check_published_router(charter, plugins)
    described = []
    for one in contributions:
        path = tmp_path / f"{one.contributor}.safetensors"
        measure_statistics(base, charter, one.calibration, tmp_path / "states").save(path)
        described.append(replace(one, statistics=path))
    result = fuse_privately(base, charter, described, tmp_path / "private", plugins)
    losses = result["losses"]["fused"]
    assert losses.keys() == {"statistics", "nothing-fitted", "evidence-zero"}
    assert losses["nothing-fitted"] == pytest.approx(losses["evidence-zero"], abs=1e-9)


def test_a_training_records_the_options_of_its_domain_and_sends_none(base, plugins, tmp_path):
    training = TrainingRules(kind="lora", rank=2, steps=2, batch=2, validate_every=1)
    amendment = Amendment(training=training, samples=SAMPLES)
    cooperative = create_cooperative(
        tmp_path / "coop",
        "trained",
        base,
        corpus=CorpusRules(block_size=16),
        amendment=amendment,
        privacy=PrivacyRules(mode="pooled"),
    )
    under = open_charter_and_base(cooperative.folder)
    out = tmp_path / "out"

    def train(**options):
        corpus = prepare_domain(under, "counting", (), out, options=options, plugins=plugins)
        key = load_or_make_key(tmp_path / "key.pem")
        return corpus, make_contribution(under, corpus, out, key=key, plugins=plugins)

    corpus, made = train(count=240)
    assert load_report(out / "corpus").options == corpus.report.options == {"count": 240}
    assert made.adapter.record["domain_options"] == {"count": 240}
    assert json.loads((out / "record.json").read_text())["domain_options"] == {"count": 240}
    assert "domain_options" not in made.contribution.manifest.training
    assert train(count=240)[1].contribution.id == made.contribution.id
    with pytest.raises(TrainingError, match=r"differs in .*domain_options"):
        train(count=241)
    with pytest.raises(ConfigError, match="Leave out --data"):
        prepare_domain(under, "counting", (out,), out, options={"count": 2}, plugins=plugins)


def test_public_text_is_read_with_options(base, plugins, tmp_path):
    cooperative = found(tmp_path / "coop", base)
    few, many = (
        keep_public_text(cooperative, "counting", options={"count": count}, plugins=plugins)
        for count in (40, 80)
    )
    assert len(few) < len(many)
    with pytest.raises(ConfigError, match="cound"):
        keep_public_text(cooperative, "counting", options={"cound": 1}, plugins=plugins)


def test_a_domain_that_needs_options_is_no_text_of_a_built_in_base(plugins):
    """Its options are each contributor's own; a charter has none."""
    asked = Amendment(domains=("strict", "counting"))
    assert list(_choose_domains(asked, plugins)) == ["counting"]
    assert list(_choose_domains(Amendment(domains=("strict",)), plugins)) == sorted(DEFAULT_DOMAINS)
