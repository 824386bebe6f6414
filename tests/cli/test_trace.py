"""`molora trace`: what it prints of runs, proofs and cooperatives, and its exit codes."""

import json
import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.storage.keys import build_public_pem
from molora_fed.tracing.verifying import export_run
from molora_fed.tracing.writing import TraceWriter


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A sealed run as folder and as one file, its public key, and its root."""
    home = tmp_path_factory.mktemp("traced")
    key = ec.generate_private_key(ec.SECP384R1())
    (home / "public.pem").write_text(build_public_pem(key))
    with TraceWriter(home / "run", key=key, run_id="r1") as trace:
        trace.append("run", {"policy": "sigma"})
        for number in range(3):
            trace.append("decision", {"task": f"t-{number}", "answer": "\x1b[31m" * 60})
        root = trace.seal()
    export_run(home / "run", home / "run.jsonl")
    return home, root


def test_verify_needs_the_file_and_the_key_only(molora, traced, tmp_path):
    home, root = traced
    for name in ("run.jsonl", "public.pem"):
        shutil.copy(home / name, tmp_path)
    call = ("trace", "verify", tmp_path / "run.jsonl", "--key", tmp_path / "public.pem")
    ran = molora(*call, "--root", root, "--sealed")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"run r1: 8 records, 8 signed for\nsealed, root {root}\n"
    assert molora(*call, "--root", "ab" * 32).code == 1

    data = (tmp_path / "run.jsonl").read_bytes()
    (tmp_path / "run.jsonl").write_bytes(data.replace(b'"t-1"', b'"t-7"'))
    ran = molora(*call)
    assert ran.code == 1 and ran.err == ""
    byte = sum(map(len, data.splitlines(keepends=True)[:5]))
    assert ran.out.startswith(f"wrong  run.jsonl: record 5 at byte {byte}: expected prev ")


def test_an_open_run_says_so(molora, traced, tmp_path):
    home, _ = traced
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "run" / "seal.jsonl").unlink()
    segment = tmp_path / "run" / "main-0000.jsonl"
    segment.write_bytes(b"".join(segment.read_bytes().splitlines(keepends=True)[:-1]))
    call = ("trace", "verify", tmp_path / "run", "--key", home / "public.pem")
    ran = molora(*call)
    assert ran.code == 0 and "open: a later state may be missing" in ran.out
    assert "checkpoint after 6 records of main-0000.jsonl, root " in ran.out
    assert molora(*call, "--sealed").code == 1


def test_show_and_stats(molora, traced):
    home, _ = traced
    ran = molora("trace", "show", home / "run", "--kind", "decision", "--limit", "2")
    assert ran.code == 0 and "more than 2 records" in ran.err
    lines = ran.out.splitlines()
    assert [line.split()[:3] for line in lines] == [[str(n), "main", "decision"] for n in (3, 4)]
    assert all(len(line) == 160 and "\x1b" not in line for line in lines)
    ran = molora("trace", "show", home / "run.jsonl", "--task", "t-2", "--whole")
    assert json.loads(ran.out.split(maxsplit=3)[3])["task"] == "t-2"
    ran = molora("trace", "stats", home / "run")
    assert ran.code == 0 and 'run ["r1"]: 8 records in 1 segments' in ran.out
    assert ["decision", "3"] in [line.split() for line in ran.out.splitlines()]


def test_prove_and_verify_the_proof(molora, traced, tmp_path):
    home, root = traced
    proof, key = tmp_path / "proof.json", home / "public.pem"
    ran = molora("trace", "prove", home / "run", "--record", 4, "--out", proof)
    assert ran.code == 0 and root in ran.out
    ran = molora("trace", "verify", proof, "--key", key, "--root", root)
    assert ran.code == 0 and "record 4 of 8 (decision) of run r1" in ran.out
    proof.write_text(proof.read_text().replace("t-1", "t-2"))
    ran = molora("trace", "verify", proof, "--key", key)
    assert ran.code == 1 and ran.out.startswith("wrong  Cannot trust proof")
    ran = molora("trace", "prove", home / "run", "--record", 99, "--out", proof)
    assert ran.code == 26 and "from 0 to 7" in ran.err


def test_wrong_paths_and_keys_are_one_line(molora, traced, tmp_path):
    home, _ = traced
    (tmp_path / "not.pem").write_bytes(b"\xff")
    for path, key in (
        (tmp_path / "nothing", home / "public.pem"),
        (home / "run", tmp_path / "nothing.pem"),
        (home / "run", tmp_path / "not.pem"),
        (home / "run", home / "run.jsonl"),
    ):
        ran = molora("trace", "verify", path, "--key", key)
        assert ran.code in (23, 26) and len(ran.err.splitlines()) == 1


def test_a_cooperative_is_recorded_and_audited(molora, setup, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(setup.cooperative, folder)
    assert molora("coop", "admit", folder, setup.trained["abc"]).code == 0
    ran = molora("trace", "record", folder)
    assert ran.code == 0 and " new events, " in ran.out
    key = folder / "trace" / "public.pem"
    ran = molora("trace", "verify", folder / "trace", "--key", key)
    assert ran.code == 0 and "open" in ran.out
    ran = molora("trace", "show", folder / "trace", "--kind", "admission", "--whole")
    bodies = [json.loads(line.split(maxsplit=3)[3]) for line in ran.out.splitlines()]
    assert bodies[-1]["data"]["to"] == "ADMITTED"
    assert "0 new events" in molora("trace", "record", folder).out
