"""A private population grows: whoever was in joins again, nobody retrains."""

import pytest
from stage_helpers import PLUGINS, TRAINING, Stage, write_text

from molora_fed.charter import (
    Amendment,
    FusionRules,
    PopulationRules,
    SampleRules,
)
from molora_fed.contributions.states import ContributionState
from molora_fed.cooperative.evolve import evolve_cooperative
from molora_fed.errors import ConfigError, PopulationError
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.mailbox import read_json
from molora_fed.federation.server_dialogue import RemoteContributor
from molora_fed.federation.worker import ContributorWorker
from molora_fed.population.bundle import load_evolved
from molora_fed.storage.keys import load_or_make_key

RULES = PopulationRules(
    data="private",
    rank=2,
    generations=1,
    start_steps=1,
    steps=1,
    blocks_per_domain=8,
    guard="spending",
)
AMENDMENT = Amendment(
    expected=2, training=TRAINING, population=RULES, fusion=FusionRules(mode="population"),
    samples=SampleRules(calibration=300, admission=4, held_out=60),
)  # fmt: skip


@pytest.mark.processes
def test_a_private_population_grows(tmp_path, tiny_checkpoint):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), AMENDMENT)
    stage.run("alpha", "beta")
    first = read_json(stage.server.outbox / "result.json")
    assert len(first["summary"]["contributions"]) == 2
    offers = [ContributorHome(tmp_path / d).offer_file.read_bytes() for d in ("alpha", "beta")]
    stage.run("alpha", "beta")  # joining again without news ends at once
    assert read_json(stage.server.outbox / "result.json")["id"] == first["id"]

    stage.run("alpha", "beta", "gamma")
    second = read_json(stage.server.outbox / "result.json")
    assert len(second["summary"]["contributions"]) == 3
    homes = {domain: ContributorHome(tmp_path / domain) for domain in ("alpha", "beta", "gamma")}
    assert [homes[d].offer_file.read_bytes() for d in ("alpha", "beta")] == offers
    for home in homes.values():
        model = load_evolved(home.result / "evolved")
        assert model.population.num_slots == 3
    with stage.cooperative.read_ledger() as ledger:
        assert len(ledger.contributions(ContributionState.ADMITTED)) == 3
    # On a folder there is nothing to evolve on.
    with pytest.raises(ConfigError, match="molora serve"):
        evolve_cooperative(stage.cooperative, plugins=PLUGINS)


def test_too_little_private_text_is_said_before_training(tmp_path, tiny_checkpoint):
    stage = Stage(tmp_path, tiny_checkpoint("gpt_neox"), AMENDMENT)
    write_text(tmp_path / "text" / "few", "few", count=12)
    home = ContributorHome(tmp_path / "few")
    load_or_make_key(home.key)
    JoinSettings("few-1", "few", (tmp_path / "text" / "few",)).save(home.settings_file)
    steps, line = ContributorWorker(home, PLUGINS).steps(), RemoteContributor()
    with pytest.raises(PopulationError, match="document clusters") as caught:
        for _ in range(50):
            envelope = stage.dialogue.next_envelope(line)
            if envelope is not None:
                stage.dialogue.accept(line, answer(home, envelope))
            next(steps)
    assert "\n" not in str(caught.value) and not list(home.training.glob("*"))
