"""`molora cascade`: a cooperative's own models answer tasks; run, report, replay, errors."""

import json
import shutil

import pytest

CONFIG = """
[cascade]
probe = "base"
members = ["abc", "xyz", "folder"]
temperature = 1.0
max_new_tokens = 4
judge = "likelihood"
[cascade.judge_options]
model = "fused"
[models.base]
kind = "base"
path = "tiny"
[models.abc]
kind = "specialist"
cooperative = "tiny"
contributor = "abc-1"
[models.xyz]
kind = "specialist"
cooperative = "tiny"
contributor = "xyz-1"
[models.folder]
kind = "specialist"
path = "trained"
base = "tiny/base"
[models.fused]
kind = "fused"
path = "out"
base = "tiny/base"
"""


@pytest.fixture(scope="module")
def place(setup, fused_once, tmp_path_factory):
    """A cooperative whose two contributions are fused, a description and tasks."""
    root = shutil.copytree(fused_once, tmp_path_factory.mktemp("cascade") / "place")
    shutil.copytree(setup.trained["abc"], root / "trained")
    (root / "c.toml").write_text(CONFIG)
    lines = [
        {"id": f"t{n}", "family": "f", "prompt": f"abc {n} ", "extractor": "normalised-text"}
        for n in range(3)
    ]
    (root / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_models_of_a_ledger_answer_and_the_run_replays_from_them(molora, place):
    ran = molora(
        "cascade", "run", place / "c.toml", "--tasks", place / "t.jsonl", "--out", place / "run"
    )
    assert ran.code == 0, ran.err
    assert "of 3 tasks" in ran.out and "operations" in ran.out
    trace = place / "run" / "trace"
    verified = molora("trace", "verify", trace, "--key", place / "run" / "public.pem")
    assert verified.code == 0 and "sealed" in verified.out
    replayed = molora("trace", "replay", trace, "--config", place / "c.toml")
    assert replayed.code == 0 and " 0 differences" in replayed.out
    reported = molora("cascade", "report", place / "run")
    assert reported.code == 0, reported.err
    assert "3 tasks answered" in (place / "run" / "report" / "cascade.html").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('contributor = "xyz-1"', 'contributor = "nobody"', "those of abc-1, xyz-1"),
        ('judge = "likelihood"', 'judge = "likelyhood"', "Did you mean 'likelihood'"),
        ('members = ["abc"', 'members = ["abd"', "each a model, got abd"),
        ("temperature = 1.0", "temperature = -1.0", "cascade.temperature"),
        ("temperature = 1.0", 'policy = "sigma"\npolicy_options = {x = 1}', "policy_options"),
    ],
)
def test_a_wrong_description_is_one_line(molora, place, tmp_path, old, new, said):
    text = CONFIG.replace(old, new)
    for name in ("tiny", "trained", "out"):
        text = text.replace(f'"{name}', f'"{place / name}')
    (tmp_path / "c.toml").write_text(text)
    ran = molora(
        *("cascade", "run", tmp_path / "c.toml", "--tasks", place / "t.jsonl"),
        *("--out", tmp_path / "run"),
    )
    assert ran.code != 0 and ran.err.count("\n") == 1 and said in ran.err
    assert not (tmp_path / "run" / "trace").exists()


def test_a_report_needs_a_run(molora, tmp_path):
    ran = molora("cascade", "report", tmp_path)
    assert ran.code != 0 and ran.err.count("\n") == 1
