"""The examples of docs/traces.md are real: they run, and the short checker agrees with ours."""

import re
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature

from molora_fed.cooperative.audit import _KINDS
from molora_fed.storage.keys import build_public_pem
from molora_fed.tracing.verifying import verify

PAGE = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_examples_run_and_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, "traces.md", "exec"), namespace)
    assert namespace["tasks"] == [f"sum-{number}" for number in range(5)]
    public = build_public_pem(namespace["key"])
    namespace["check"]("run.jsonl", public)
    data = Path("run.jsonl").read_bytes()
    for changed in (data.replace(b"sum-3", b"sum-8"), data.replace(b'"count":9', b'"count":8')):
        assert changed != data
        Path("run.jsonl").write_bytes(changed)
        with pytest.raises((AssertionError, InvalidSignature)):
            namespace["check"]("run.jsonl", public)
        assert not verify(Path("run.jsonl"), public).ok


def test_every_kind_of_a_history_has_a_row():
    for kind in _KINDS.values():
        assert f"\n| `{kind}` |" in PAGE
