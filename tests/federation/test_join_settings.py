"""What a contributor joins with is checked before anything is written."""

from pathlib import Path

import pytest

from molora_fed import Configurable, Document, PluginOptions, hookimpl
from molora_fed.errors import ConfigError, CorpusError
from molora_fed.federation.envelopes import keep_letter
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.letters import Acknowledgement
from molora_fed.plugins import load_plugins
from molora_fed.training.choices import TrainingChoices


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (CorpusError, {"domain": "python", "data": (Path("empty"),)}),
        (ConfigError, {"domain": "python", "name": "No Name"}),
        (ConfigError, {"domain": ""}),
        (ConfigError, {"domain": "d" * 60, "data": (Path("text"),)}),
    ],
)
def test_a_wrong_setting_leaves_nothing(error, fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    home = ContributorHome(tmp_path / "home")
    with pytest.raises(error):
        prepare_home(home, JoinSettings(**{"name": "", **fields}))
    assert not home.root.exists()


def test_a_name_is_made_of_domain_and_key(tmp_path):
    home = ContributorHome(tmp_path / "home")
    settings = prepare_home(home, JoinSettings(name="", domain="python"))
    assert settings.name.startswith("python-")
    assert home.read_settings() == settings


@pytest.mark.parametrize("adapter", ["", "/adapters/mine"])
def test_settings_that_an_earlier_version_kept_stay_as_they_are(adapter):
    # The recipe of a training in flight is a hash over these values.
    kept = {
        "name": "me", "domain": "mine", "data": ["/texts/a", "/texts/b.txt"],
        "adapter": adapter, "shard": [1, 3], "threads": 2,
    }  # fmt: skip
    assert JoinSettings.from_json(kept).to_json() == kept


@pytest.mark.parametrize(
    ("state", "stays"), [("ADMITTED", True), ("QUARANTINED", False), ("REJECTED", False)]
)
def test_a_refused_contribution_is_asked_about_again(tmp_path, state, stays):
    """It may have been released since; what is in stays in."""
    home = ContributorHome(tmp_path / "home")
    prepare_home(home, JoinSettings(name="", domain="python"))
    kept = Acknowledgement(
        shipment="a" * 64, contribution_id="b" * 64, state=state, findings=[], signature="ab"
    )
    keep_letter(home.acknowledgement_letter, kept)
    prepare_home(home, home.read_settings())
    assert (home.read_acknowledgement() == kept) is stays


def test_how_text_is_read_is_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"dialog": [{"from": "gpt", "value": "Hello."}]}')
    home = ContributorHome(tmp_path / "home")
    settings = JoinSettings(
        "me", "mine", (tmp_path / "a.jsonl",), text_field="dialog", loss_on="assistant"
    )
    assert prepare_home(home, settings) == settings == home.read_settings()
    assert (settings.text.text_field, settings.text.loss_on) == ("dialog", "assistant")


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (ConfigError, {"loss_on": "users"}),
        (CorpusError, {"loss_on": "assistant"}),  # there is no answer in it
        (CorpusError, {"text_field": "body"}),
    ],
)
def test_a_wrong_way_to_read_text_is_said_before_anything_is_written(error, fields, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}')
    home = ContributorHome(tmp_path / "home")
    with pytest.raises(error):
        prepare_home(home, JoinSettings("me", "mine", (tmp_path / "a.jsonl",), **fields))
    assert not home.root.exists()


def read_some(count):
    return [Document(f"{n}.txt", "text") for n in range(count)]


class SomeOptions(PluginOptions):
    count: int = 1


class Some(Configurable[SomeOptions]):
    def __call__(self):
        return read_some(self.options.count)


class SomeText:
    @hookimpl
    def register_domains(self, register):
        register("some", Some, summary="Some text", source="test")


def test_options_of_a_domain_are_checked_and_kept(tmp_path, monkeypatch):
    plugins = load_plugins([("mine (molora-mine 0.1.0)", SomeText())])
    monkeypatch.setattr("molora_fed.plugins.get_plugins", lambda: plugins)
    home = ContributorHome(tmp_path / "home")
    for options, data, why in (
        ({"cound": 3}, (), "cound: Extra inputs"),
        ({"count": "many"}, (), "count: Input should be a valid integer"),
        ({"count": 3}, (tmp_path,), "Leave out --data or --domain-option"),
    ):
        with pytest.raises(ConfigError, match=why):
            prepare_home(home, JoinSettings("me", "some", data, domain_options=options))
        assert not home.root.exists()
    settings = prepare_home(home, JoinSettings("me", "some", domain_options={"count": 3}))
    assert settings.domain_options == {"count": 3} == home.read_settings().domain_options
    assert "domain_options" not in JoinSettings("me", "some").to_json()


def test_a_data_set_of_the_hub_is_no_path():
    assert JoinSettings("me", "mine", (Path("datasets:a/b"),)).to_json()["data"] == ["datasets:a/b"]


def test_a_launcher_is_kept_and_checked_before_anything_is_written(tmp_path):
    home = ContributorHome(tmp_path / "home")
    training = TrainingChoices(launcher="no-such-launcher --now")
    with pytest.raises(ConfigError, match="Cannot train with the launcher 'no-such-launcher'"):
        prepare_home(home, JoinSettings(name="", domain="python", training=training))
    assert not home.root.exists()
    training = TrainingChoices(launcher="accelerate launch --multi_gpu")
    settings = prepare_home(home, JoinSettings(name="", domain="python", training=training))
    assert settings.training == training == home.read_settings().training
    assert settings.to_json()["training"] == {"launcher": training.launcher}
    assert "training" not in JoinSettings(name="", domain="python").to_json()
