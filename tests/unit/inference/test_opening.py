"""One way to open a model, whatever it is."""

import shutil

import pytest
from adaptation_helpers import build_population, build_router
from molora_kalavai.uniform import UniformRouter

from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.errors import ConfigError
from molora_fed.inference.fused_build import build_causal_lm, open_causal_lm
from molora_fed.inference.generate import Sampling, generate
from molora_fed.inference.opening import PlainModel, open_model
from molora_fed.inference.texts import evaluate_texts
from molora_fed.models.base import load_base
from molora_fed.population.bundle import EvolvedModel, save_evolved
from molora_fed.population.evolution import Branch
from molora_fed.routing.bundle import save_fused
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.testing import build_random_adapter


@pytest.fixture(scope="module")
def home(tiny_checkpoint, tmp_path_factory):
    """A cooperative's folder: base, specialist, fused model, evolved model."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_checkpoint(), home / "base")
    base = load_base(home / "base")
    folder = home / "specialist" / "adapter"
    save_adapter(build_random_adapter(base.model, rank=2, seed=1), base.model, folder)
    expert = FusedExpert("one", load_adapter(folder), "letters", "ab" * 32)
    router = UniformRouter(2)
    fused = FusedModel(base, (FusedExpert("base", None), expert), router, "uniform", "logit", 0)
    save_fused(fused, home / "fused", adapters={"one": folder})
    branch = Branch(build_population(base), build_router().eval())
    save_evolved(base, branch, "parallel-sigmoid", home / "evolution" / "evolved")
    return home


def test_a_folder_of_several_models_gives_the_first_kind_asked_for(home):
    assert isinstance(open_model(home), FusedModel)
    assert isinstance(open_model(home / "fused"), FusedModel)
    assert isinstance(open_model(home, kinds=("evolved", "fused")), EvolvedModel)
    assert isinstance(open_model(home / "evolution"), EvolvedModel)
    base = open_model(home, kinds=("base",))
    assert isinstance(base, PlainModel) and base.adapter is None


def test_every_kind_writes_text_that_names_its_gates(home):
    gates = {}
    for kind in ("fused", "evolved", "base"):
        engine = build_causal_lm(open_model(home, kinds=(kind,)))
        (text,) = generate(engine, "abc", Sampling(3))
        assert 1 <= len(text.tokens) <= 3
        gates[kind] = tuple(text.gates)
    assert gates == {
        "fused": ("base", "one"),
        "evolved": ("g0-s0", "g0-s1", "g0-s2"),
        "base": ("base",),
    }


def test_a_specialist_needs_its_base(home):
    with pytest.raises(ConfigError, match="expected the folder of its base, got none"):
        open_model(home / "specialist")
    specialist = open_model(home / "specialist", base_folder=home)
    assert isinstance(specialist, PlainModel) and specialist.adapter is not None
    fused = open_model(home)
    assert specialist.adapter.hash == fused.experts[1].adapter.hash
    with pytest.raises(ConfigError, match="expected a fused or evolved model"):
        evaluate_texts(specialist, {})


def test_an_evolved_model_is_measured_like_a_fused_one(home, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text that no one has trained on. " * 12)
    found = [
        evaluate_texts(open_model(home, kinds=(kind,)), {"mine": [text]}, block_size=32)
        for kind in ("fused", "evolved")
    ]
    assert found[0].losses("base")["mine"] == pytest.approx(found[1].losses("base")["mine"])
    assert {"fused:uniform", "specialist:one"} <= found[0].sums.keys()
    assert {"fused:parallel-sigmoid", "specialist:g0-s0"} <= found[1].sums.keys()


def test_no_model_is_one_line_that_names_what_was_looked_for(home, tmp_path):
    with pytest.raises(ConfigError, match=r"fused, evolved, got none.*`molora fuse` or") as caught:
        open_model(tmp_path, kinds=("fused", "evolved"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected one of evolved"):
        open_model(home / "fused", kinds=("evolved",))


def test_a_saved_model_is_opened_as_what_it_was(home, tmp_path):
    for kind in ("fused", "evolved", "base"):
        model = open_causal_lm(home, kinds=(kind,))
        model.save_pretrained(tmp_path / kind)
        again = open_causal_lm(tmp_path / kind, kinds=(kind,))
        assert again.fingerprint == model.fingerprint
        texts = [generate(one, "abc", Sampling(4)) for one in (model, again)]
        assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match="expected one of specialist, got none"):
        open_causal_lm(tmp_path / "fused", kinds=("specialist",))


def test_the_best_experts_after_the_prompt_write_on(home):
    model = open_causal_lm(home, kinds=("fused",))
    (text,) = generate(model, "abc", Sampling(4, experts_per_text=1))
    held = list(text.gates.values())
    assert sum(gate > 0.5 for gate in held) == 1 and sum(held) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="experts_per_text >= 1"):
        Sampling(4, experts_per_text=0)
