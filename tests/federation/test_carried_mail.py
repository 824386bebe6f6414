"""Files that plugins compute, from a contributor's training to the router that others get."""

import pytest
import torch
from carried_helpers import NAME, MeanStateRouter, load_with_plugin
from safetensors.torch import load_file
from stage_helpers import PLUGINS, TRAINING, Stage

from molora_fed.charter import Amendment, FusionRules, PrivacyRules, SampleRules
from molora_fed.contributions.manifest import load_contribution
from molora_fed.cooperative.outgoing import describe_outgoing
from molora_fed.errors import ConfigError
from molora_fed.federation.consent import give_consent, has_consent
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.sent import count_sent

TRIO = ("alpha", "beta", "gamma")
FILE = f"carried/{NAME}.safetensors"


def build_stage(root, checkpoint, mode, **settings):
    amendment = Amendment(
        expected=3,
        domains=TRIO,
        training=TRAINING,
        fusion=FusionRules(
            router=MeanStateRouter.name, compare=(), merges=(), fallback="", carried=(NAME,)
        ),
        samples=SampleRules(calibration=40, admission=4, held_out=40),
    )
    plugins = load_with_plugin()
    return Stage(
        root, checkpoint, amendment, privacy=PrivacyRules(mode=mode), plugins=plugins, **settings
    )


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["pooled", "private"])
def test_a_federation_routes_by_what_is_carried(tmp_path, tiny_checkpoint, mode):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), mode)
    shown = set()

    def watch(homes, steps):
        """Which experts' carried files have reached alpha, which measures others' adapters."""
        found = homes["alpha"].private.glob(f"fusion/*/experts/*/{FILE}")
        shown.update(path.parents[1].name for path in found)

    stage.run(*TRIO, watch=watch)
    made = {who: load_contribution(ContributorHome(tmp_path / who).contribution) for who in TRIO}
    means = {one.id: one.carried[NAME]["mean"] for one in made.values()}
    assert shown == (set(means) if mode == "private" else set())
    for who, one in made.items():
        home = ContributorHome(tmp_path / who)
        entry = one.manifest.carried_files[NAME]
        assert count_sent(home)["carried"] == {"messages": 1, "bytes": entry.bytes}
        rows = describe_outgoing(
            stage.cooperative.charter, stage.plugins, manifest=one.manifest, width=32
        ).rows
        assert [row.bytes for row in rows if f"'{NAME}'" in row.what] == [entry.bytes]
        # What the fused model is made of is the mean of everybody, in the order of the experts.
        router = load_file(home.result / "fused" / "router.safetensors")["means"]
        expected = [torch.zeros(32), *(means[name] for name in sorted(means))]
        assert torch.equal(router, torch.stack(expected))


def test_whoever_lacks_the_plugin_is_told_before_anything_is_trained(tmp_path, tiny_checkpoint):
    stage = build_stage(tmp_path, tiny_checkpoint("gpt_neox"), "pooled")
    words = f"expected an installed plugin that computes the carried files '{NAME}', got none"
    with pytest.raises(ConfigError, match=words):
        describe_outgoing(stage.cooperative.charter, PLUGINS, width=None)
    stage.plugins = PLUGINS
    with pytest.raises(ConfigError, match=words):
        stage.run("alpha")
    home = ContributorHome(tmp_path / "alpha")
    assert not home.contribution.exists()
    assert not list(home.root.glob("training/*"))


def test_consent_to_less_is_none_to_carried_files(tmp_path, tiny_checkpoint):
    home = ContributorHome(tmp_path / "home")
    home.private.mkdir(parents=True)
    for mode in ("pooled", "private"):
        stage = build_stage(tmp_path / mode, tiny_checkpoint("gpt_neox"), mode)
        charter = stage.cooperative.charter
        fusion = charter.amendment.fusion.model_copy(update={"carried": ()})
        amendment = charter.amendment.model_copy(update={"fusion": fusion})
        plain = charter.model_copy(update={"amendment": amendment})
        give_consent(home, plain)
        assert has_consent(home, plain) and not has_consent(home, charter)
        give_consent(home, charter)
        assert has_consent(home, plain) and has_consent(home, charter)
