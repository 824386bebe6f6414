"""No change of a sealed run goes unnoticed, whoever makes it without the key."""

import json
import shutil
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molora_fed.tracing.segments import SEAL_FILE
from molora_fed.tracing.verifying import export_run, seal_run, verify

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OPERATIONS = (
    "edit", "insert-bytes", "delete-bytes", "delete-lines", "duplicate-line", "swap-lines",
    "truncate", "splice-line", "splice-tail", "splice-head", "rechain", "reorder",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, key, write):
    """Three sealed runs: one, one of another id, and one of the same id with other content."""
    root = tmp_path_factory.mktemp("runs")
    for name, run_id, salt in (("one", "run", 0), ("two", "other", 0), ("three", "run", 1)):
        folder = root / name
        write(folder, 9, run_id=run_id, salt=salt, checkpoint_records=4)
        write(folder, 3, run_id=run_id, salt=salt, writer="zeta")
        write(folder, 5, run_id=run_id, salt=salt, checkpoint_records=3)
        seal_run(folder, key=key)
        export_run(folder, root / f"{name}.jsonl")
    return root


def rechain(lines, start):
    """Let the chain fit again after a change, as someone without the key can."""
    head = sha256(lines[start]).hexdigest()
    for at in range(start + 1, len(lines)):
        value = json.loads(lines[at])
        value["prev"] = head
        if value["kind"] == "checkpoint":
            value["body"]["head"] = head
        lines[at] = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        head = sha256(lines[at]).hexdigest()
    return lines


def change(data, others, draw):
    """Bytes of a file after one random change."""
    operation = draw(st.sampled_from(OPERATIONS))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    lines = data.splitlines()
    row = draw(st.integers(0, len(lines) - 1))
    other = draw(st.sampled_from(others)).splitlines()
    from_row = draw(st.integers(0, len(other) - 1))
    if operation == "edit":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if operation == "insert-bytes":
        return data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at:]
    if operation == "delete-bytes":
        return data[:at] + data[at + draw(st.integers(1, 50)) :]
    if operation == "truncate":
        return data[:at]
    if operation == "delete-lines":
        del lines[row : row + draw(st.integers(1, 3))]
    elif operation == "duplicate-line":
        lines.insert(draw(st.integers(0, len(lines))), lines[row])
    elif operation == "swap-lines":
        to = draw(st.integers(0, len(lines) - 1))
        lines[row], lines[to] = lines[to], lines[row]
    elif operation == "splice-line":
        lines[row] = other[from_row]
    elif operation == "splice-tail":
        lines[row:] = other[from_row:]
    elif operation == "splice-head":
        lines[:row] = other[:from_row]
    elif operation == "rechain":
        value = json.loads(lines[row])
        value["body"]["task"] = draw(st.text(max_size=5))
        lines[row] = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        lines = rechain(lines, row)
    else:
        lines = draw(st.permutations(lines))
    return b"".join(line + b"\n" for line in lines)


@SETTINGS
@given(data=st.data())
def test_every_change_of_a_sealed_file_is_found(runs, tmp_path, public, data):
    original = (runs / "one.jsonl").read_bytes()
    others = [(runs / f"{name}.jsonl").read_bytes() for name in ("one", "two", "three")]
    changed = change(original, others, data.draw)
    whole = {runs / f"{name}.jsonl" for name in ("one", "two", "three")}
    path = tmp_path / "changed.jsonl"
    path.write_bytes(changed)
    report = verify(path, public)
    # A whole other run is a valid one; only its root tells that it is not this run.
    if changed in {each.read_bytes() for each in whole}:
        assert report.ok
        root = verify(runs / "one", public).root
        assert verify(path, public, root).ok == (changed == original)
    else:
        assert not report.ok
        assert all(p.reason and 0 <= p.byte <= len(changed) for p in report.problems)


@SETTINGS
@given(data=st.data())
def test_every_change_of_a_sealed_folder_is_found(runs, tmp_path, public, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs / "one", folder)
    files = sorted(path.name for path in folder.glob("*.jsonl"))
    file = folder / data.draw(st.sampled_from(files))
    what = data.draw(st.sampled_from(("change", "remove", "move", "exchange", "replace")))
    original = {name: (folder / name).read_bytes() for name in files}
    if what == "change":
        others = [(runs / name / file.name).read_bytes() for name in ("one", "two", "three")]
        file.write_bytes(change(file.read_bytes(), others, data.draw))
    elif what == "remove":
        file.unlink()
    elif what == "move":
        file.rename(folder / data.draw(st.sampled_from(["main-0002.jsonl", "zeta-0001.jsonl"])))
    elif what == "exchange":
        to = folder / data.draw(st.sampled_from(files))
        first, second = file.read_bytes(), to.read_bytes()
        file.write_bytes(second)
        to.write_bytes(first)
    else:
        file.write_bytes(
            (runs / data.draw(st.sampled_from(["two", "three"])) / file.name).read_bytes()
        )
    now = {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}
    assert verify(folder, public).ok == (now == original)


def test_a_run_without_its_seal_is_not_taken_for_an_open_one(runs, tmp_path, public):
    shutil.copytree(runs / "one", tmp_path / "run")
    (tmp_path / "run" / SEAL_FILE).unlink()
    report = verify(tmp_path / "run", public)
    assert not report.ok and "sealing began" in report.problems[0].reason


def test_a_signature_in_its_other_form_is_found(runs, tmp_path, public):
    """(r, n - s) verifies too; were it taken, a changed byte would go unnoticed."""
    from cryptography.hazmat.primitives.asymmetric.utils import (
        decode_dss_signature,
        encode_dss_signature,
    )

    from molora_fed.tracing.records import _ORDER

    lines = (runs / "one.jsonl").read_bytes().splitlines()
    seal = json.loads(lines[-1])
    r, s = decode_dss_signature(bytes.fromhex(seal["body"]["signature"]))
    seal["body"]["signature"] = encode_dss_signature(r, _ORDER - s).hex()
    lines[-1] = json.dumps(seal, sort_keys=True, separators=(",", ":")).encode()
    path = tmp_path / "other.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert not verify(path, public).ok


def test_the_place_of_a_change_is_told(runs, tmp_path, public):
    data = (runs / "one.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    lines[5] = lines[5].replace(b"main-", b"mean-")
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(lines))
    first = verify(path, public).problems[0]
    assert (first.file, first.record) == ("run.jsonl", 6)
    assert first.byte == sum(map(len, lines[:6]))
    assert "the one before it" in first.reason


def test_another_key_vouches_for_nothing(runs, public):
    from cryptography.hazmat.primitives.asymmetric import ec

    from molora_fed.storage.keys import build_public_pem

    other = build_public_pem(ec.generate_private_key(ec.SECP384R1()))
    report = verify(runs / "one.jsonl", other)
    assert not report.ok and report.covered == 0
