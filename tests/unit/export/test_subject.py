"""What is opened for export: names, the right report, and weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from adaptation_helpers import build_population, build_router

from molora_fed.adapters.save import save_adapter
from molora_fed.errors import ConfigError
from molora_fed.export.exporting import Choices, export_model
from molora_fed.export.subject import Specialist, choose_weights, open_subject
from molora_fed.models.base import load_base
from molora_fed.population.bundle import save_evolved
from molora_fed.population.evolution import Branch
from molora_fed.population.mixture import Mixture
from molora_fed.testing import build_random_adapter


@pytest.fixture
def folder(save_model, tiny_checkpoint):
    checkpoint = tiny_checkpoint("gpt_neox")
    model = load_base(checkpoint).model
    return save_model(
        checkpoint, {n: build_random_adapter(model, seed=i) for i, n in enumerate("ab")}
    )


def write_report(folder, *, adapters=None):
    """The kept report beside a model, as if it were of the model's adapters."""
    subject = open_subject(folder)
    report = json.loads((folder.parents[2] / "kept.json").read_text())
    hashes = {each.name: each.adapter.hash for each in subject.specialists}
    report["fingerprints"]["adapters"] = hashes if adapters is None else adapters
    report["gates"]["uniform"] = {
        "x": {"base": 0.2, "a": 0.5, "b": 0.3},
        "y": {"base": 0.0, "a": 0.1, "b": 0.9},
    }
    (folder.parent / "report").mkdir(exist_ok=True)
    (folder.parent / "report" / "report.json").write_text(json.dumps(report))


@pytest.fixture
def kept(folder, request):
    shutil.copyfile(
        request.config.rootpath / "tests/data/report.json", folder.parents[2] / "kept.json"
    )


def test_mean_gates_of_the_report_are_the_weights(folder, kept):
    write_report(folder)
    for place in (folder, folder.parent):
        subject = open_subject(place)
        weights = choose_weights(subject, None)
        assert weights.values == pytest.approx({"a": 0.3, "b": 0.6})
        assert weights.source.startswith("mean gates of the router uniform on held-out text")
    assert subject.gates["x"] == {"base": 0.2, "a": 0.5, "b": 0.3}


def test_a_report_of_other_adapters_is_no_report(folder, kept):
    write_report(folder, adapters={"a": "0" * 64, "b": "1" * 64})
    subject = open_subject(folder)
    assert subject.report is None
    weights = choose_weights(subject, None)
    assert weights.values == {"a": 0.5, "b": 0.5} and weights.source.startswith("equal")


@pytest.mark.parametrize(
    "gates", [None, [], {"uniform": 3}, {"uniform": {"x": {"a": "much", "b": 1}}}]
)
def test_malformed_gates_are_none(folder, kept, gates):
    write_report(folder)
    subject = open_subject(folder)
    broken = replace(subject, report={**subject.report, "gates": gates})
    assert broken.gates == {} and choose_weights(broken, None).source.startswith("equal")


def test_weights_that_were_asked_for(folder):
    subject = open_subject(folder)
    assert choose_weights(subject, " b = 1e-1 ").values == {"a": 0.0, "b": 0.1}
    assert choose_weights(subject, "a=-2,base=0.5").values == {"a": -2.0, "b": 0.0}


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("a=0.5,c=1", "'c', which is none of them"),
        ("a=0.5,a=0.5", "'a' twice"),
        ("a=nan", "'nan' for 'a'"),
        ("a=inf", "'inf' for 'a'"),
        ("a=half", "'half' for 'a'"),
        ("a", "'' for 'a'"),
        ("", "'', which is none of them"),
        ("a=0,base=1", "expected one that is not 0 at least"),
    ],
)
def test_weights_that_cannot_be(folder, text, got):
    with pytest.raises(ConfigError) as found:
        choose_weights(open_subject(folder), text)
    assert got in str(found.value) and "\n" not in str(found.value)


def test_a_specialist_is_named_by_its_folder(tiny_checkpoint, tmp_path):
    base = load_base(tiny_checkpoint("gpt_neox"))
    adapter = build_random_adapter(base.model)
    save_adapter(adapter, base.model, tmp_path / "Große Liebe!" / "adapter")
    subject = open_subject(tmp_path / "Große Liebe!", base_folder=base.folder)
    assert subject.kind == "specialist"
    assert [each.name for each in subject.specialists] == ["Gro-e-Liebe"]


def test_slots_of_an_evolved_model_are_merged_as_if_gates_were_constant(
    tiny_checkpoint, tmp_path, tokens, our_logits, peft_logits
):
    checkpoint = tiny_checkpoint("gpt_neox")
    base = load_base(checkpoint)
    branch = Branch(build_population(base), build_router().eval())
    save_evolved(base, branch, "parallel-sigmoid", tmp_path / "evolved")
    subject = open_subject(tmp_path / "evolved")
    assert (subject.kind, subject.mixture) == ("evolved", "layers")
    names = [each.name for each in subject.specialists]
    assert names == ["g0-s0", "g0-s1", "g0-s2"]
    export_model(subject, tmp_path / "out", Choices("merged", weights="g0-s0=0.5,g0-s1=1"))
    found = peft_logits(checkpoint, tmp_path / "out")
    population = branch.population
    gates = torch.tensor([0.5, 1.0, 0.0]).expand(*tokens.shape, 3)
    with torch.no_grad(), Mixture(base.model, population).mixed(gates):
        constant = base.model(tokens).logits
    assert (found - constant).abs().max() < 2e-5
    assert (constant - our_logits(subject, {})).abs().max() > 0.01


def test_names_are_apart_on_every_system(folder):
    from molora_fed.export.subject import _name_apart

    one = open_subject(folder).specialists[0]
    asked = ["Base", "a", "A", "../../etc", "a/b", "...", "x" * 200]
    found = [each.name for each in _name_apart(replace(one, name=name) for name in asked)]
    assert found == ["Base-2", "a", "A-2", "etc", "a-b", "specialist", "x" * 63]
    assert isinstance(one, Specialist)


def test_a_base_alone_is_for_gguf_only(tiny_checkpoint, tmp_path):
    subject = open_subject(tiny_checkpoint("gpt_neox"))
    assert subject.kind == "base" and subject.specialists == ()
    for to in ("peft", "merged"):
        with pytest.raises(ConfigError, match="got a base alone"):
            export_model(subject, tmp_path / "out", Choices(to))
    with pytest.raises(ConfigError, match="got a base alone"):
        export_model(subject, tmp_path / "out", Choices("gguf", weights="a=1"))
