"""Kinds of plugins: their files, the base's weights for those who ask, and what is refused."""

import json
import re
from pathlib import Path

import own_kinds
import pytest
import torch
from own_kinds import RowScales, WholeWeights
from safetensors.torch import load_file, save_file

from molora_fed import adapters
from molora_fed.adapters.compatibility import applied, check_adapter_fits
from molora_fed.adapters.contract import AdapterKind
from molora_fed.adapters.files import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from molora_fed.adapters.limits import BaseWeights
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError, PluginError
from molora_fed.models.layout import adaptable_modules, weight_of
from molora_fed.plugins import hookimpl, load_plugins

PAGE = Path(__file__).parents[3] / "docs" / "hooks" / "adapter-kinds.md"
RULES = AdapterRules(kinds=(RowScales.name, WholeWeights.name))


@pytest.fixture
def plugins():
    return load_plugins([("own", own_kinds)])


def train(kind, model, tokens, folder):
    """Three steps, exported; gives the trained model."""
    trained, parameters = kind.prepare(model, RULES, 4, seed=3)
    with torch.no_grad():
        assert torch.equal(trained(tokens).logits, model(tokens).logits)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        trained(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kind.export(trained, model, folder, 4, RULES)
    return trained.eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(RowScales, {}), (WholeWeights, {}), (WholeWeights, {"precision": "int8"})],
)
def test_what_was_trained_is_what_the_base_with_the_adapter_computes(
    kind, options, model, tokens, logits, tmp_path, plugins
):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(kind(options), model, tokens, tmp_path / "a")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    adapter = load_adapter(tmp_path / "a", rules=RULES, model=model, plugins=plugins, name="me")
    assert adapter.kind == kind.name
    check_adapter_fits(adapter, model, rules=RULES)
    with applied(model, adapter):
        found = logits(model, tokens)
    assert torch.allclose(found, logits(trained, tokens), atol=0.05 if options else 1e-4)


def test_scales_are_shipped_as_scales(tiny_model, tokens, tmp_path):
    model = tiny_model()
    train(RowScales(), model, tokens, tmp_path / "a")
    rows = sum(len(weight_of(module)) for module in adaptable_modules(model, 0).values())
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert sum(tensor.numel() for tensor in tensors.values()) == rows


def test_scales_without_their_base_are_refused(tiny_model, tokens, tmp_path, plugins):
    train(RowScales(), tiny_model(), tokens, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"'law-1': expected the base .* got none"):
        load_adapter(tmp_path / "a", rules=RULES, plugins=plugins, name="law-1")


def test_files_from_outside_name_no_layer_that_the_base_has_not(
    tiny_model, tokens, tmp_path, plugins
):
    model = tiny_model()
    train(RowScales(), model, tokens, tmp_path / "a")
    path = tmp_path / "a" / WEIGHTS_FILE
    first, *_ = tensors = load_file(path)

    def read(changed):
        save_file(changed, path)
        config = {"kind": "row-scales", "tensors": sorted(changed)}
        (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(config))
        load_adapter(tmp_path / "a", rules=RULES, model=model, plugins=plugins, name="law-1")

    with pytest.raises(AdapterError, match=r"'law-1': expected \d+ scales of"):
        read({**tensors, first: torch.ones(3)})
    with pytest.raises(AdapterError, match=r"linear layers, got 'lm_head'"):
        read({**tensors, "lm_head.scale": torch.ones(3)})


def test_weights_are_handed_out_as_copies(model):
    name, module = next(iter(adaptable_modules(model, 0).items()))
    weight = BaseWeights(model).read(name, name="me")
    assert torch.equal(weight, weight_of(module)) and weight.dtype == torch.float32
    weight.zero_()
    assert bool(weight_of(module).any())


class WithoutPower(AdapterKind):
    name = "lacking"
    narrow_learning_rate = 1e-3

    def prepare(self, *arguments, **settings):
        raise NotImplementedError

    def export(self, *arguments, **settings):
        raise NotImplementedError

    def load(self, *arguments, **settings):
        raise NotImplementedError


class WithoutBase(WithoutPower):
    width_power = 1.0

    def load(self, folder, limits, *, name=""):
        raise NotImplementedError


class Complete(WithoutPower):
    width_power = 1


def resolve(kind):
    class Plugin:
        @hookimpl
        def register_adapter_kinds(self, register):
            register("lacking", kind, summary="A kind", source="own definition")

    return load_plugins([("own", Plugin())]).adapter_kinds.resolve("lacking")


def test_a_kind_says_how_fast_it_learns_and_takes_the_base():
    with pytest.raises(PluginError, match="class attribute 'width_power', a number"):
        resolve(WithoutPower)
    with pytest.raises(PluginError, match=r"expected load\(.*base\), got one without 'base'"):
        resolve(WithoutBase)
    assert resolve(Complete) is Complete


def test_every_name_for_authors_is_there():
    for name in adapters.__all__:
        assert getattr(adapters, name) is not None
    assert set(adapters.__all__) <= set(dir(adapters))
    assert not hasattr(adapters, "Nothing")


def test_every_name_of_the_pages_table_is_there():
    table = PAGE.read_text(encoding="utf-8").partition("| to | use |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([A-Za-z_]+)\(", table))
    assert (
        {"write_differences", "build_loaded", "describe_unreadable"} <= named <= {*adapters.__all__}
    )
