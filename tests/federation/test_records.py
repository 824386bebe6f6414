import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora_fed.errors import FederationError
from molora_fed.federation.envelopes import Envelope, parse_letters
from molora_fed.federation.letters import Manifest, State
from molora_fed.federation.messages import (
    FileEntry,
    Part,
    PartName,
    Shipment,
    describe_folder,
    parse_part_name,
    parse_shipment,
    plan_parts,
)
from molora_fed.federation.wire import pack_envelope, unpack_envelope

HASH = "a" * 64
hashes = st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,10}", fullmatch=True)
sizes = st.integers(0, 10_000)


@given(st.dictionaries(names, st.tuples(hashes, sizes), max_size=8), st.integers(1, 3_000))
def test_parts_cover_every_file_once(files, part_bytes):
    entries = tuple(sorted(FileEntry(name, *what) for name, what in files.items()))
    shipment = parse_shipment(Shipment(entries).to_json())
    assert shipment.files == entries
    sizes = {entry.sha256: entry.num_bytes for entry in entries}
    parts = plan_parts(shipment, part_bytes=part_bytes)
    assert sum(part.length for part in parts) == sum(sizes.values())
    for sha256, size in sizes.items():
        ends = 0
        for part in sorted(part for part in parts if part.sha256 == sha256):
            assert part.offset == ends and 0 < part.length <= part_bytes
            ends += part.length
        assert ends == size


@given(st.builds(PartName, hashes, st.integers(0, 2**40), st.integers(1, 2**20)))
def test_part_names_round_trip(name):
    assert parse_part_name(str(name)) == name


@pytest.mark.parametrize(
    "value",
    ["", "x", f"{HASH}-0", f"{HASH}-0-0", f"{HASH}--1-5", f"{HASH}-0-99999999999", None, 3,
     f"{HASH[1:]}/-0-1", f"{HASH}-0-¹"],
)  # fmt: skip
def test_malformed_part_names_are_refused(value):
    with pytest.raises(FederationError):
        parse_part_name(value)


@pytest.mark.parametrize(
    "files",
    [
        None,
        [{"name": "../key.pem", "sha256": HASH, "num_bytes": 1}],
        [{"name": "/etc/passwd", "sha256": HASH, "num_bytes": 1}],
        [{"name": "a/../../b", "sha256": HASH, "num_bytes": 1}],
        [{"name": ".hidden", "sha256": HASH, "num_bytes": 1}],
        [{"name": "a//b", "sha256": HASH, "num_bytes": 1}],
        [{"name": "a", "sha256": "A" * 64, "num_bytes": 1}],
        [{"name": "a", "sha256": HASH, "num_bytes": -1}],
        [{"name": "a", "sha256": HASH, "num_bytes": True}],
        [{"name": "a", "sha256": HASH, "num_bytes": 2**50}],
        [{"name": "a", "sha256": HASH, "num_bytes": 1, "mode": "755"}],
        [{"name": "a", "sha256": HASH, "num_bytes": 1}] * 2,
        [
            {"name": "a", "sha256": HASH, "num_bytes": 1},
            {"name": "a/b", "sha256": HASH, "num_bytes": 1},
        ],
    ],
)
def test_malformed_shipments_are_refused(files):
    with pytest.raises(FederationError) as caught:
        parse_shipment(files)
    assert "\n" not in str(caught.value)


def test_a_shipment_over_the_limit_is_refused():
    files = [{"name": "a", "sha256": HASH, "num_bytes": 11}]
    assert parse_shipment(files, max_bytes=11).num_bytes == 11
    with pytest.raises(FederationError, match="at most 10 bytes"):
        parse_shipment(files, max_bytes=10)


def test_a_folder_is_described_without_hidden_files(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a.bin").write_bytes(b"abc")
    (tmp_path / ".a.tmp").write_bytes(b"half")
    shipment = describe_folder(tmp_path)
    assert [(entry.name, entry.num_bytes) for entry in shipment.files] == [("adapter/a.bin", 3)]


states = st.builds(
    State, phase=st.sampled_from(["JOINING", "TRAINING"]), message=st.text(max_size=20),
    step=st.none() | st.integers(0, 2**53), loss=st.none() | st.floats(-1e6, 1e6), held=st.just([]),
)  # fmt: skip
manifests = st.builds(Manifest, files=st.just(Shipment((FileEntry("a", HASH, 3),))))


@given(
    st.lists(states | manifests, max_size=4),
    st.lists(st.binary(min_size=1, max_size=50), max_size=4),
)
def test_envelopes_survive_flower_records(letters, blobs):
    parts = tuple(Part(PartName(f"{n:064x}", n, len(blob)), blob) for n, blob in enumerate(blobs))
    envelope = Envelope(tuple(letters), parts)
    assert unpack_envelope(pack_envelope(envelope), sender="contributor") == envelope


def test_envelopes_that_flower_could_not_carry_are_refused():
    with pytest.raises(FederationError, match="bytes of letters"):
        names = [PartName(f"{n:064x}", 0, 1) for n in range(8_000)]
        pack_envelope(Envelope((State(held=names), State(held=names))))
    data = bytes(40 * 2**20)
    parts = tuple(Part(PartName(f"{n:064x}", 0, len(data)), data) for n in range(2))
    with pytest.raises(FederationError, match="of parts"):
        pack_envelope(Envelope(parts=parts))


def test_foreign_messages_are_refused():
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    def message(text, version=1):
        return RecordDict({"letters": ConfigRecord({"version": version, "json": text})})

    short = message("[]")
    short["parts"] = ArrayRecord({f"{HASH}-0-5": Array("bytes", (4,), "molora.part", b"1234")})
    for content in (
        RecordDict(), message("[]", 2), message("{"), message('[{"kind": "run"}]'),
        message('[{"kind": "run-code", "body": {}}]'), message("[" * 100_000), short,
    ):  # fmt: skip
        with pytest.raises(FederationError) as caught:
            unpack_envelope(content, sender="server")
        assert "\n" not in str(caught.value)


def test_letters_must_be_objects():
    with pytest.raises(FederationError):
        parse_letters({"kind": "hello"}, sender="server")
    with pytest.raises(FederationError):
        parse_letters([{"kind": "hello", "body": []}], sender="server")
