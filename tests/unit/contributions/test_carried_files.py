"""Files that plugins compute: who must carry them, who must not, and which are good."""

from dataclasses import replace

import pytest
import torch
from carried_helpers import NAME, compute_mean_states, load_with_plugin
from safetensors.torch import save

from molora_fed.charter import FusionRules, TrainingRules
from molora_fed.contributions.admission import AdmissionCandidate
from molora_fed.contributions.build import describe_contribution
from molora_fed.contributions.carried import (
    CarriedContext,
    check_makers,
    compute_carried,
)
from molora_fed.contributions.checks import check_carried_files
from molora_fed.contributions.ledger import Ledger, create_ledger
from molora_fed.contributions.reading import sign_amendment
from molora_fed.contributions.receive import receive_contribution
from molora_fed.contributions.states import ContributionState
from molora_fed.errors import AdapterError, AdmissionError, ConfigError, PluginError
from molora_fed.hookspecs import Register
from molora_fed.plugins import hookimpl, load_plugins
from molora_fed.storage.keys import build_public_pem
from molora_fed.storage.options import Choice
from molora_fed.testing import build_carried_context
from molora_fed.types import Split

FILE = f"carried/{NAME}.safetensors"
GOOD = save({"mean": torch.arange(4.0)})


@pytest.fixture
def carrying(charter):
    """The same charter, whose contributions carry mean states."""
    fusion = FusionRules(carried=(NAME,), max_carried_bytes=4_000)
    return charter.model_copy(
        update={"amendment": charter.amendment.model_copy(update={"fusion": fusion})}
    )


@pytest.fixture
def receive(tmp_path, store, base, plugins, coordinator_key):
    """`receive(contribution, charter)`: the receipt, from a ledger of that charter."""
    opened = []

    def run(contribution, charter):
        path = tmp_path / "own" / f"{len(opened)}.db"
        create_ledger(
            path, coordinator_key=build_public_pem(coordinator_key),
            first=sign_amendment(coordinator_key, charter.identity_hash, charter.amendment),
        )  # fmt: skip
        opened.append(Ledger(path))
        return receive_contribution(
            opened[-1], store, contribution.folder, charter=charter, base=base, plugins=plugins
        )

    yield run
    for ledger in opened:
        ledger.close()


def test_they_are_signed_stored_admitted_and_read_anew_each_time(
    contribute, carrying, receive, store
):
    made = contribute(charter=carrying, carried={NAME: GOOD})
    entry = made.manifest.carried_files[NAME]
    assert made.manifest.files[FILE] == entry and entry.bytes == len(GOOD)
    receipt = receive(made, carrying)
    assert receipt.state == ContributionState.ADMITTED
    assert "carried-files" in receipt.decision.checks
    assert store.has(entry.sha256)
    rows = [row for row in describe_contribution(made.manifest) if NAME in row.what]
    assert [(row.bytes, row.exact, row.blocks) for row in rows] == [(len(GOOD), True, 0)]
    made.carried[NAME]["mean"].fill_(9.0)
    assert made.carried[NAME]["mean"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert made.carried["another"] is None
    assert list(made.carried) == [NAME] and "another" not in made.carried


def test_a_contribution_without_any_has_the_bytes_it_always_had(contribute, charter):
    made = contribute()
    assert b"carried" not in made.manifest.canonical
    assert "carried" not in str(charter.amendment.model_dump(mode="json"))
    assert len(made.carried) == 0


def test_without_them_and_with_them_elsewhere_a_contribution_is_refused_in_one_line(
    contribute, charter, carrying, receive
):
    with pytest.raises(AdmissionError, match=rf"expected {FILE}, got none\. "):
        receive(contribute(charter=carrying), carrying)
    made = contribute("other", carried={NAME: GOOD})
    with pytest.raises(AdmissionError, match=rf"expected no {FILE}, which.*got one\. "):
        receive(made, charter)


def test_one_that_was_received_before_they_were_asked_for_stays_in(
    contribute, charter, carrying, ledger, store, base, plugins, coordinator_key
):
    def submit(contribution, under):
        return receive_contribution(
            ledger, store, contribution.folder, charter=under, base=base, plugins=plugins
        )

    made = contribute()
    assert submit(made, charter).state == ContributionState.ADMITTED
    later = carrying.amendment.model_copy(update={"number": 1})
    now = carrying.model_copy(update={"amendment": later})
    ledger.add_amendment(sign_amendment(coordinator_key, now.identity_hash, later), actor="x")
    assert submit(made, now).known
    with pytest.raises(AdmissionError, match=f"expected {FILE}, got none"):
        submit(contribute("late", contributor="late"), now)


def test_admission_holds_it_to_what_was_asked_when_it_was_received(
    contribute, charter, carrying, base, plugins
):
    """As one that lay in the ledger when the amendment came, and is judged again."""
    plain, made = contribute(), contribute("made", charter=carrying, carried={NAME: GOOD})

    def judge(contribution, then):
        candidate = AdmissionCandidate(
            contribution, carrying, base, plugins, received_under=then.amendment
        )
        return check_carried_files(candidate)

    assert judge(plain, charter) is None and judge(made, carrying) is None
    missing, unknown = judge(plain, carrying), judge(made, charter)
    assert (missing.expected, missing.found) == (FILE, "none")
    assert unknown.expected.startswith(f"no {FILE}") and unknown.found == "one"


def test_an_oversize_file_is_refused_before_it_is_read(contribute, carrying, receive):
    made = contribute(charter=carrying, carried={NAME: save({"mean": torch.zeros(2_000)})})
    with pytest.raises(AdmissionError, match=f"{FILE} of at most 4000 bytes, got 80"):
        receive(made, carrying)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (save({"mean": torch.tensor([1.0, float("nan")])}), "finite numbers in 'mean'"),
        (save({"mean": torch.arange(4)}), "F32, F16, BF16 in 'mean', got I64"),
        (save({"a b": torch.zeros(2)}), "names of tensors of letters"),
        (save({"mean": torch.zeros(2, 0)}), "none of them empty"),
        (save({}), "1 to 4,096 tensors, got 0"),
        (b"\x80\x04no tensors", "a safetensors file"),
    ],
)
def test_what_no_plugin_may_give_is_rejected_at_the_door(
    contribute, carrying, receive, data, words
):
    receipt = receive(contribute(charter=carrying, carried={NAME: data}), carrying)
    assert receipt.state == ContributionState.REJECTED
    (refusal,) = receipt.decision.refusals
    assert words in refusal.message and "\n" not in refusal.message
    assert f"carried file '{NAME}' of 'legal-07'" in refusal.message
    assert refusal.check == "readable-files"


def test_a_file_that_is_not_signed_or_another_one_is_refused(contribute, carrying, receive):
    made = contribute(charter=carrying, carried={NAME: GOOD})
    (made.folder / FILE).write_bytes(save({"mean": torch.ones(4)}))
    with pytest.raises(AdapterError, match=f"'{FILE}' of 'legal-07'"):
        receive(made, carrying)
    made = contribute("more", charter=carrying, carried={NAME: GOOD})
    (made.folder / "carried" / "more.safetensors").write_bytes(GOOD)
    with pytest.raises(AdapterError, match=r"carried/more\.safetensors: not signed"):
        receive(made, carrying)


def test_whoever_lacks_the_plugin_is_told_what_to_install(carrying, plugins):
    with pytest.raises(ConfigError, match="Install the package that registers 'mean-states'"):
        check_makers(carrying, plugins)
    check_makers(carrying, load_with_plugin())


def test_a_charter_names_each_once_and_by_a_registered_name():
    for names in ((NAME, NAME), ("../up",), ("Upper",), tuple(f"n{i}" for i in range(17))):
        with pytest.raises(ValueError, match="carried"):
            FusionRules(carried=names)


def test_equal_contexts_give_equal_bytes_whatever_is_drawn_elsewhere():
    def compute(seed):
        torch.manual_seed(seed)
        return compute_carried(Choice(name=NAME), build_carried_context(), load_with_plugin())

    assert compute(1) == compute(2)


def test_progress_is_told_in_steps_without_what_was_measured():
    told = []

    def compute(context):
        context.progress(1, 2, loss=3.5)
        return {"mean": torch.zeros(2)}

    context = replace(
        build_carried_context(), progress=lambda *steps, **figures: told.append((steps, figures))
    )
    compute_carried(Choice(name=NAME), context, broken(compute))
    assert told == [((1, 2), {})]


def broken(make):
    """The installed plugins, and one that registers `make`."""

    class Broken:
        @staticmethod
        @hookimpl
        def register_carried_files(register: Register) -> None:
            register(NAME, make, summary="Broken", source="own definition")

    return load_plugins(extra=[("broken (molora-broken 1.0)", Broken)])


def change_base(context):
    with torch.no_grad():
        context.base.model.get_input_embeddings().weight[0] += 1
    return {"mean": torch.zeros(2)}


def read_held_out(context):
    return {"mean": torch.from_numpy(next(context.blocks(Split.HELD_OUT)).tokens).float()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (change_base, "expected a base that stays as it was, got changes of model.embed_tokens"),
        (read_held_out, "expected train or validation, got text that routers"),
        (lambda context: {"mean": torch.tensor([float("inf")])}, "NaN or infinity"),
        (lambda context: [torch.zeros(2)], "tensors by name, got list"),
        (lambda context: {"mean": torch.zeros(9_999)}, "of at most 4,000 bytes, got 40,0"),
        (lambda context: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_breaks_its_word_is_named_and_nothing_is_built(make, words):
    context = replace(build_carried_context(), max_bytes=4_000)
    with pytest.raises(PluginError) as caught:
        compute_carried(Choice(name=NAME), context, broken(make))
    message = str(caught.value)
    assert message.startswith("Carried file 'mean-states' of broken (molora-broken 1.0) failed in")
    assert words in message and "\n" not in message


def test_blocks_come_a_batch_at_a_time_in_one_order():
    context = build_carried_context(blocks=5, block_size=8)
    assert isinstance(context, CarriedContext) and isinstance(context.rules, TrainingRules)
    shapes = [blocks.tokens.shape for blocks in context.blocks(Split.TRAIN, batch=2)]
    assert shapes == [(2, 8), (2, 8), (1, 8)]
    first, again = (
        [blocks.fingerprint for blocks in context.blocks(Split.TRAIN, batch=2)] for _ in range(2)
    )
    assert first == again
    found = compute_mean_states(context)["mean"]
    assert found.shape == (32,) and bool(found.isfinite().all())


def test_text_that_is_measured_on_is_not_handed_over():
    seen = []

    def compute(context):
        seen.extend(context.samples)
        return {"mean": torch.zeros(2)}

    context = build_carried_context()
    held_out = replace(context.samples[Split.VALIDATION], split=Split.HELD_OUT)
    whole = replace(context, samples={**context.samples, Split.HELD_OUT: held_out})
    compute_carried(Choice(name=NAME), whole, broken(compute))
    assert seen == [Split.TRAIN, Split.VALIDATION]
