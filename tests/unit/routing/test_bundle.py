import json
import shutil
from dataclasses import replace

import pytest
import torch
from fused_helpers import ProbeRouter, build_fused, random_tokens

from molora_fed import hookimpl
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.save import save_adapter
from molora_fed.errors import AdapterError, BaseCheckpointError, MoloraError, RoutingError
from molora_fed.errors import UnknownNameError as Unknown
from molora_fed.inference.fused_build import build_causal_lm
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins
from molora_fed.routing.bundle import load_fused, load_manifest, save_fused
from molora_fed.routing.fused import FusedExpert, FusedModel
from molora_fed.routing.top_k import limit_experts
from molora_fed.storage.files import hash_file


class Probes:
    @hookimpl
    def register_routers(self, register):
        register("probe", ProbeRouter, summary="for tests", source="own definition")


@pytest.fixture(scope="module")
def plugins():
    return load_plugins([("test (test 1)", Probes())])


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    """A saved fused model beside a copy of its base, as `home/base` and `home/fused`."""
    home = tmp_path / "home"
    shutil.copytree(tiny_checkpoint(), home / "base")
    base = load_base(home / "base")
    drawn = build_fused(base, columns=("base_hidden", "mean_hidden", "evidence"))
    adapters, experts = {}, []
    for expert in drawn.experts:
        if expert.adapter is not None:
            adapters[expert.name] = tmp_path / "uploads" / expert.name
            save_adapter(expert.adapter, base.model, adapters[expert.name])
        experts.append(
            FusedExpert(
                expert.name,
                load_adapter(adapters[expert.name]) if expert.adapter else None,
                expert.domain,
                "ab" * 32 if expert.adapter else None,
            )
        )
    fused = FusedModel(base, tuple(experts), drawn.router, "probe", "logit", drawn.frozen_depth)
    save_fused(fused, home / "fused", adapters=adapters)
    shutil.rmtree(tmp_path / "uploads")
    return fused, home


def test_a_saved_model_loads_wherever_its_folder_went(saved, plugins, tmp_path):
    fused, home = saved
    tokens = random_tokens(2, 12)
    expected = build_causal_lm(fused)(tokens)
    home.rename(tmp_path / "elsewhere")
    moved = load_fused(tmp_path / "elsewhere" / "fused", plugins=plugins)
    output = build_causal_lm(moved)(tokens)
    torch.testing.assert_close(output.gates, expected.gates, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    assert [(e.name, e.domain, e.contribution) for e in moved.experts] == [
        (e.name, e.domain, e.contribution) for e in fused.experts
    ]
    assert (moved.mixture, moved.router_name, moved.frozen_depth) == ("logit", "probe", 1)


def test_saving_what_was_loaded_gives_the_same_bytes(saved, plugins):
    _, home = saved
    loaded = replace(load_fused(home / "fused", plugins=plugins), entry=None)
    folders = {e.name: home / "fused" / "adapters" / e.name for e in loaded.experts}
    save_fused(loaded, home / "again", adapters=folders)
    files = sorted(p.relative_to(home / "fused") for p in (home / "fused").rglob("*.*"))
    assert len(files) == 2 + 2 * 3
    for file in files:
        assert hash_file(home / "again" / file) == hash_file(home / "fused" / file)


def test_nothing_of_this_machine_is_written(saved):
    _, home = saved
    manifest = load_manifest(home / "fused")
    assert manifest.base.path == "../base"
    assert str(home.parent) not in (home / "fused" / "fused.json").read_text()


def test_the_base_may_lie_anywhere_if_one_says_where(saved, plugins, tmp_path):
    _, home = saved
    (home / "fused").rename(tmp_path / "alone")
    with pytest.raises(BaseCheckpointError, match=r"no such folder\. Say where the base is"):
        load_fused(tmp_path / "alone", plugins=plugins)
    assert load_fused(tmp_path / "alone", base_folder=home / "base", plugins=plugins).experts


def test_another_base_is_refused(saved, plugins, tiny_checkpoint):
    _, home = saved
    with pytest.raises(BaseCheckpointError, match=r"expected .* with weights"):
        load_fused(home / "fused", base_folder=tiny_checkpoint("gpt_neox", 3), plugins=plugins)


def test_an_unknown_router_is_named(saved):
    _, home = saved
    with pytest.raises(Unknown, match="Unknown router 'probe'"):
        load_fused(home / "fused", plugins=load_plugins())


def test_a_limit_on_experts_is_kept(saved, plugins):
    fused, home = saved
    tensors = fused.router.state_tensors()
    router = limit_experts(ProbeRouter, 2)(3, fused.router.options, tensors)
    limited = FusedModel(fused.base, fused.experts, router, "probe", "logit", fused.frozen_depth)
    folders = {e.name: home / "fused" / "adapters" / e.name for e in fused.experts}
    assert save_fused(limited, home / "limited", adapters=folders).router.top_k == 2
    loaded = load_fused(home / "limited", plugins=plugins)
    tokens = random_tokens(2, 9)
    gates = build_causal_lm(loaded)(tokens).gates
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates, build_causal_lm(limited)(tokens).gates, atol=1e-5, rtol=0)
    assert load_manifest(home / "fused").router.top_k is None


def edit(home, change):
    path = home / "fused" / "fused.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c.update(format_version=2), "format_version"),
        (lambda c: c["base"].update(path="/etc"), "must be relative"),
        (lambda c: c["experts"][0].update(name="../../x"), "experts.0.name"),
        (lambda c: c["experts"].append(c["experts"][0]), "names must be distinct"),
        (lambda c: c.update(mixture="soup"), "mixture"),
        (
            lambda c: c["router"].update(state="00" * 32),
            "router.safetensors: expected SHA-256 0000",
        ),
        (lambda c: c["router"]["options"].update(nonsense=1), "options and state of router"),
        (lambda c: c["router"].update(top_k=0), "router.top_k"),
        (lambda c: c["experts"][0].update(adapter="00" * 32), "adapter 'expert-0': expected SHA"),
        (lambda c: c["experts"].pop(), r"expected projection \(D, 2\)"),
    ],
)
def test_a_changed_manifest_is_refused_in_one_line(saved, plugins, change, match):
    _, home = saved
    edit(home, change)
    with pytest.raises(MoloraError, match=match) as caught:
        build_causal_lm(load_fused(home / "fused", plugins=plugins))(random_tokens(1, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["router.safetensors", "fused.json"])
def test_truncated_or_missing_files_are_refused(saved, plugins, file):
    _, home = saved
    path = home / "fused" / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RoutingError, match=r"Cannot load fused model"):
        load_fused(home / "fused", plugins=plugins)
    path.unlink()
    with pytest.raises(RoutingError, match=f"expected a readable '?{file}"):
        load_fused(home / "fused", plugins=plugins)


def test_a_changed_adapter_is_refused(saved, plugins):
    _, home = saved
    path = home / "fused" / "adapters" / "expert-0" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(RoutingError, match="adapter 'expert-0': expected SHA-256"):
        load_fused(home / "fused", plugins=plugins)
    shutil.rmtree(path.parent)
    with pytest.raises(AdapterError, match="no such folder"):
        load_fused(home / "fused", plugins=plugins)


def test_saving_needs_every_adapters_files(saved):
    fused, home = saved
    with pytest.raises(RoutingError, match="got none of expert-2"):
        save_fused(fused, home / "new", adapters={"expert-0": home})
    assert not (home / "new").exists()


def test_a_name_that_is_no_folders_name_is_refused(saved):
    fused, home = saved
    experts = (FusedExpert("../up", fused.experts[0].adapter), *fused.experts[1:])
    bad = FusedModel(fused.base, experts, fused.router, "probe", "logit", 1)
    folders = {e.name: home for e in experts}
    with pytest.raises(RoutingError, match="Cannot save fused model"):
        save_fused(bad, home / "new", adapters=folders)
    assert not (home / "new").exists()
