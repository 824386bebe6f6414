"""Every parser of the door on made-up input: it answers with a value within bounds, or one line."""

import json
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from molora_fed.errors import FederationError
from molora_fed.federation.envelopes import open_letter, parse_letter, parse_letters
from molora_fed.federation.letters import FROM_CONTRIBUTOR, FROM_SERVER, State, cut_findings
from molora_fed.federation.messages import parse_part_name, parse_shipment
from molora_fed.federation.status import FederationEvent, WorkerState, read_worker_state
from molora_fed.federation.wire import unpack_envelope
from molora_fed.storage.files import canonical_json
from molora_fed.storage.untrusted import clean, parse_json

MANY = settings(max_examples=300, deadline=None)
KINDS = {**FROM_SERVER, **FROM_CONTRIBUTOR}
FIELDS = sorted(
    {name for model in KINDS.values() for name in model.model_fields} | {"kind", "body"}
)

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["TRAINING", "ADMITTED", "train", "a" * 64, f"{'a' * 64}-0-1", "\ud800", "[/x]"]
    ),
    st.text(string.hexdigits, min_size=60, max_size=70),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.floats(), texts,
    st.integers(-(2**70), 2**70), st.sampled_from([10**400, -1, 0, 2**53, 2**63]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(FIELDS) | texts, inner, max_size=5),
    ),
    max_leaves=20,
)
bodies = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.fixed_dictionaries(
        {},
        optional={field.alias or name: values for name, field in KINDS[kind].model_fields.items()},
    ).map(lambda body: {"kind": kind, "body": body})
)


def check_line(error):
    line = str(error)
    assert "\n" not in line and len(line) < 1_000 and line == clean(line, 1_000)


def check_letters(letters):
    """What was read can be sent, kept and shown."""
    for letter in letters:
        canonical_json(letter.to_json())
        if isinstance(letter, State):
            event = FederationEvent(**{"phase": "JOINING", **letter.known})
            assert event.loss is None or f"{event.loss:.3f}"
            assert event.eta_seconds is None or round(event.eta_seconds) >= 0


@MANY
@given(value=st.one_of(values, st.lists(bodies, max_size=3)), sender=st.booleans())
def test_letters(value, sender):
    try:
        letters = parse_letters(value, sender="server" if sender else "contributor")
    except FederationError as error:
        check_line(error)
    else:
        check_letters(letters)


@MANY
@given(text=st.one_of(st.text(max_size=80), st.lists(bodies, max_size=3).map(json.dumps)))
def test_messages(text):
    content = {"letters": {"version": 1, "json": text}}
    try:
        envelope = unpack_envelope(content, sender="contributor")
    except FederationError as error:
        check_line(error)
    else:
        check_letters(envelope.letters)


@MANY
@given(
    content=st.one_of(
        values,
        st.fixed_dictionaries({"letters": values}, optional={"parts": values}),
        st.fixed_dictionaries(
            {
                "letters": st.fixed_dictionaries({"version": scalars, "json": texts | scalars}),
                "parts": values,
            }
        ),
    )
)
def test_messages_that_are_none(content):
    try:
        unpack_envelope(content, sender="server")
    except FederationError as error:
        check_line(error)


@MANY
@given(data=st.one_of(st.binary(max_size=80), bodies.map(lambda b: json.dumps(b["body"]).encode())))
def test_kept_letters(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("kept", numbered=True)
    for number, model in enumerate(KINDS.values()):
        path = folder / f"{number}.json"
        path.write_bytes(data)
        letter = open_letter(path, model)
        assert path.exists() == (letter is not None)


@MANY
@given(values)
def test_shipments(value):
    try:
        shipment = parse_shipment(value)
    except FederationError as error:
        check_line(error)
    else:
        assert parse_shipment(shipment.to_json()) == shipment


@MANY
@given(values | st.from_regex(r"[0-9a-f]{64}-[0-9]{1,20}-[0-9]{1,20}", fullmatch=True))
def test_part_names(value):
    try:
        assert parse_part_name(str(parse_part_name(value))) == parse_part_name(value)
    except FederationError as error:
        check_line(error)


@MANY
@given(st.dictionaries(st.sampled_from(sorted(WorkerState.model_fields)), values) | values)
def test_a_workers_own_state_is_always_something(value):
    known = read_worker_state(value).known
    assert not known or FederationEvent(**known)
    assert read_worker_state(known).known == known


@MANY
@given(st.lists(st.text(max_size=50) | st.sampled_from(["x" * 10**5, "\ud800"]), max_size=80))
def test_findings_are_always_short(findings):
    cut = cut_findings(findings)
    assert sum(map(len, cut)) < 5_000 and cut == [clean(one, 1_000) for one in cut]
    canonical_json(cut)


@MANY
@given(values)
def test_json(value):
    try:
        parsed = parse_json(json.dumps(value), max_bytes=100_000)
    except ValueError as error:
        check_line(error)
    else:
        assert json.loads(canonical_json(parsed)) == parsed


def test_a_letters_content_is_read_whole_or_not_at_all():
    for model in KINDS.values():
        for value in ([], None, "text", 10**400, {"x" * 10_000: 1}):
            try:
                parse_letter(model, value, what="a letter")
            except FederationError as error:
                check_line(error)
            else:
                raise AssertionError(model)
