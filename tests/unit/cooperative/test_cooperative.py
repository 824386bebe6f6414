import stat
import subprocess
import sys

import pytest

from molora_fed.charter import (
    AdapterRules,
    AdmissionRules,
    Amendment,
    CorpusRules,
    FusionRules,
    PrivacyRules,
    SampleRules,
    TrainingRules,
    load_charter,
    write_charter,
)
from molora_fed.contributions.ledger import Ledger
from molora_fed.contributions.states import CooperativeState
from molora_fed.cooperative.cooperative import (
    amend_cooperative,
    create_cooperative,
    open_cooperative,
)
from molora_fed.errors import (
    AdapterError,
    CharterError,
    LedgerError,
    SignatureError,
    UnknownNameError,
)
from molora_fed.models.base import load_base
from molora_fed.plugins import load_plugins


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    return load_base(tiny_checkpoint())


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture
def create(tmp_path, base, plugins):
    """`create(...)`: a cooperative of blocks of 16 tokens."""

    def run(folder="home", name="tiny", **changes):
        arguments = {"corpus": CorpusRules(block_size=16), "plugins": plugins, **changes}
        return create_cooperative(tmp_path / folder, name, base, **arguments)

    return run


def test_created_whole(create, base):
    cooperative = create(amendment=Amendment(domains=("python", "legal"), expected=2))
    assert {p.name for p in cooperative.folder.iterdir()} == {
        "base", "cooperative.toml", "keys", "ledger.db", "ledger.db.lock",
    }  # fmt: skip
    assert stat.S_IMODE(cooperative.key_path.stat().st_mode) == 0o600
    assert load_charter(cooperative.folder) == cooperative.charter
    assert load_base(cooperative.base_folder).weights == base.weights
    with cooperative.read_ledger() as ledger:
        assert ledger.cooperative_state == CooperativeState.CREATED
        assert ledger.identity_hash == cooperative.charter.identity_hash
        (signed,) = ledger.amendments()
        signed.check(ledger.coordinator_key)
        assert signed.amendment == cooperative.charter.amendment
    assert open_cooperative(cooperative.folder) == cooperative


def test_identity_depends_on_what_can_never_change_only(create):
    one = create("one")
    assert create("two").charter.identity_hash == one.charter.identity_hash
    changed = create("three", amendment=Amendment(seed=7))
    assert changed.charter.identity_hash == one.charter.identity_hash
    other = create("four", adapters=AdapterRules(max_rank=65))
    assert other.charter.identity_hash != one.charter.identity_hash


def test_created_again_is_opened_and_another_is_refused(create):
    cooperative = create()
    before = cooperative.key_path.read_bytes()
    assert create() == cooperative
    assert cooperative.key_path.read_bytes() == before
    with pytest.raises(CharterError, match="or amend the one there"):
        create(name="other")
    with pytest.raises(CharterError, match="or amend the one there"):
        create(amendment=Amendment(seed=7))


@pytest.mark.parametrize("lost", ["cooperative.toml", "ledger.db", "base"])
def test_creation_stopped_in_between_goes_on(create, lost):
    cooperative = create()
    key = cooperative.key_path.read_bytes()
    for name in {"cooperative.toml", lost}:
        path = cooperative.folder / name
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink()
    assert create() == cooperative
    assert cooperative.key_path.read_bytes() == key
    assert open_cooperative(cooperative.folder) == cooperative


def test_ledger_made_and_killed_before_its_tables(create):
    cooperative = create()
    (cooperative.folder / "cooperative.toml").unlink()
    cooperative.ledger_path.write_bytes(b"")
    assert create() == cooperative


def test_amendments(create, plugins):
    cooperative = create()
    first = Amendment(number=1, domains=("legal",), training=TrainingRules(steps=7))
    with cooperative.open_ledger() as ledger:
        amended = amend_cooperative(cooperative, ledger, first, plugins=plugins)
        assert amend_cooperative(cooperative, ledger, first, plugins=plugins) == amended
        with pytest.raises(LedgerError, match="expected number 2, got 4"):
            amend_cooperative(cooperative, ledger, Amendment(number=4), plugins=plugins)
        second = Amendment(number=2, fusion=FusionRules(router="evidense"))
        with pytest.raises(UnknownNameError, match="Did you mean 'evidence'"):
            amend_cooperative(cooperative, ledger, second, plugins=plugins)
        with pytest.raises(CharterError, match="a training rank of at most 64, got 99"):
            amend_cooperative(
                cooperative,
                ledger,
                Amendment(number=2, training=TrainingRules(rank=99)),
                plugins=plugins,
            )
    assert amended.charter.identity_hash == cooperative.charter.identity_hash
    assert open_cooperative(cooperative.folder) == amended
    assert open_cooperative(cooperative.folder).charter.amendment.training.steps == 7
    assert create() == amended  # Created again with amendment 0: still the same cooperative.


def test_published_statistics_need_calibration_text_of_the_bases_width(create, base):
    rules = {"privacy": PrivacyRules(mode="statistics")}
    fusion = FusionRules(router="statistics", compare=())
    least = 8 * base.hidden_size // 16
    few = SampleRules(calibration=least - 1)
    with pytest.raises(CharterError, match=f"{least} calibration blocks at least, .*{least - 1}"):
        create(amendment=Amendment(fusion=fusion, samples=few), **rules)
    with pytest.raises(CharterError, match=r"made from published statistics .*'evidence-mixed'"):
        create(amendment=Amendment(), **rules)
    found = create(amendment=Amendment(fusion=fusion), **rules)
    assert found.charter.publishes_statistics and found.charter.is_summed


def test_ledger_counts_where_the_file_was_not_yet_written(create, plugins):
    cooperative = create()
    with cooperative.open_ledger() as ledger:
        amended = amend_cooperative(cooperative, ledger, Amendment(number=1), plugins=plugins)
    write_charter(cooperative.charter, cooperative.folder / "cooperative.toml")
    assert open_cooperative(cooperative.folder) == amended


def test_unsigned_changes_by_hand_are_refused(create):
    cooperative = create()
    path = cooperative.folder / "cooperative.toml"
    text = path.read_text()
    path.write_text(text.replace("seed = 42\n", "seed = 43\n").replace("split_seed = 43", ""))
    with pytest.raises(CharterError, match="Cannot open cooperative"):
        open_cooperative(cooperative.folder)
    path.write_text(text.replace("max_loss_rise = 0.05", "max_loss_rise = 5.0"))
    with pytest.raises(CharterError, match=r"expected an \[amendment\] that is signed"):
        open_cooperative(cooperative.folder)
    path.write_text(text.replace("max_rank = 64", "max_rank = 65"))
    with pytest.raises(CharterError, match=r"Take back the change to \[identity\]"):
        open_cooperative(cooperative.folder)
    path.write_text(text.replace("max_rank", "maximum_rank"))
    with pytest.raises(CharterError, match=r"identity\.adapters\.maximum_rank: Extra inputs"):
        open_cooperative(cooperative.folder)


def test_amending_needs_the_coordinators_key(create, plugins):
    cooperative, other = create("one"), create("two")
    cooperative.key_path.write_bytes(other.key_path.read_bytes())
    with (
        cooperative.open_ledger() as ledger,
        pytest.raises(SignatureError, match="amendment 1: expected a signature of key"),
    ):
        amend_cooperative(cooperative, ledger, Amendment(number=1), plugins=plugins)
    assert open_cooperative(cooperative.folder) == cooperative


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "Not A Name"}, CharterError, "lower-case letters"),
        ({"amendment": Amendment(number=1)}, CharterError, "expected amendment 0, got 1"),
        ({"adapters": AdapterRules(frozen_depth=2)}, CharterError, "below the base's 2 blocks"),
        ({"corpus": CorpusRules(block_size=100_000)}, CharterError, "positions, got 100000"),
        ({"adapters": AdapterRules(kinds=("lorra",))}, UnknownNameError, "'lora'"),
        ({"adapters": AdapterRules(kinds=("lora",))}, CharterError, "among lora .*, got svd"),
        (
            {"amendment": Amendment(training=TrainingRules(options={"precison": "int4"}))},
            AdapterError,
            "options of kind 'svd'.*precison",
        ),
        (
            {"amendment": Amendment(fusion=FusionRules(compare=("linea",)))},
            UnknownNameError,
            "Unknown router 'linea'.*Did you mean 'linear'",
        ),
        (
            {"amendment": Amendment(admission=AdmissionRules(checks=("finite",)))},
            UnknownNameError,
            "Unknown admission check 'finite'",
        ),
    ],
)
def test_bad_charter_makes_nothing(create, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        create(**changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_cooperative_there(tmp_path):
    with pytest.raises(CharterError, match="molora coop create"):
        open_cooperative(tmp_path)


def test_ledger_of_a_cooperative_has_one_writer(create):
    cooperative = create()
    with cooperative.open_ledger(), pytest.raises(LedgerError, match="only writer"):
        Ledger(cooperative.ledger_path)


def test_opening_loads_no_torch(create):
    script = (
        "import sys; from pathlib import Path\n"
        "from molora_fed.cooperative.cooperative import open_cooperative\n"
        "open_cooperative(Path(sys.argv[1]))\n"
        "sys.exit(' '.join({'torch', 'transformers', 'flwr'} & sys.modules.keys()))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(create().folder)], capture_output=True, text=True
    )
    assert found.stderr.strip() == ""
