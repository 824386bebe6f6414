import pytest

from molora_fed.charter import Amendment, CorpusRules
from molora_fed.cooperative import create as founding
from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.cooperative.create import found_cooperative
from molora_fed.corpus.builtin import DEFAULT_DOMAINS
from molora_fed.errors import BaseCheckpointError, CharterError
from molora_fed.plugins import Entry, Plugins, load_plugins

SMALL = CorpusRules(block_size=32)


@pytest.fixture
def asked(monkeypatch):
    """Domains the built-in base was asked to read, instead of training it."""
    seen = []

    def refuse(folder, documents, **settings):
        seen.append((sorted(documents), settings["config"]))
        raise BaseCheckpointError("stands in for training")

    monkeypatch.setattr(founding, "create_builtin_base", refuse)
    return seen


@pytest.fixture
def plugins():
    """The installed plugins with domains that are read in no time."""
    found = load_plugins()
    found.domains = Plugins().domains
    for name in (*DEFAULT_DOMAINS, "law"):
        found.domains.add(Entry(name, lambda: iter(()), "Text", "none", "test"))
    return found


def test_founds_on_a_folder_and_finds_it_again(tmp_path, tiny_checkpoint):
    phases = []
    for _ in range(2):
        cooperative, base = found_cooperative(
            tmp_path / "c", "one", source=str(tiny_checkpoint()), corpus=SMALL,
            on_phase=phases.append,
        )  # fmt: skip
        assert open_cooperative(tmp_path / "c") == cooperative
        assert cooperative.charter.identity.base.weights == base.weights
    assert len(set(phases)) == 1


@pytest.mark.parametrize(
    ("domains", "read"),
    [
        ((), sorted(DEFAULT_DOMAINS)),
        (("law", "python"), ["law", "python"]),
        (("mine", "law"), ["law"]),
        (("mine",), sorted(DEFAULT_DOMAINS)),
    ],
)
def test_builtin_base_reads_the_registered_domains_asked_for(
    asked, plugins, tmp_path, domains, read
):
    with pytest.raises(BaseCheckpointError, match="stands in"):
        found_cooperative(
            tmp_path / "c", "one", amendment=Amendment(domains=domains, seed=7), base_steps=11,
            corpus=SMALL, plugins=plugins,
        )  # fmt: skip
    [(names, config)] = asked
    assert names == read
    assert (config.seed, config.steps, config.block_size) == (7, 11, 32)


def test_everything_is_checked_before_the_base_is_made(asked, tmp_path):
    with pytest.raises(CharterError, match=r"domains of lower-case .* got 'a b', 'C'"):
        found_cooperative(tmp_path / "c", "one", amendment=Amendment(domains=("a b", "C", "d")))
    with pytest.raises(CharterError, match="expected a name"):
        found_cooperative(tmp_path / "c", "Bad Name")
    assert not asked
    assert not (tmp_path / "c").exists()


def test_base_that_does_not_suit_leaves_nothing(tmp_path, tiny_checkpoint):
    with pytest.raises(CharterError, match="block size"):
        found_cooperative(
            tmp_path / "c", "one", source=str(tiny_checkpoint()), corpus=CorpusRules(block_size=512)
        )
    assert not (tmp_path / "c").exists()
    with pytest.raises(BaseCheckpointError, match="none of these"):
        found_cooperative(tmp_path / "c", "one", source=str(tmp_path / "nowhere"))
    assert not (tmp_path / "c").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("kept")
    with pytest.raises(CharterError, match="block size"):
        found_cooperative(
            tmp_path / "d", "one", source=str(tiny_checkpoint()), corpus=CorpusRules(block_size=512)
        )
    assert (tmp_path / "d" / "mine.txt").exists()
