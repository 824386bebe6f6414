import errno
import json
import re
import shutil

import pytest

from molora_fed.errors import ConfigError, StorageError
from molora_fed.reporting import report
from molora_fed.reporting.report import find_report, load_report, read_metrics, write_report


def test_everything_is_written(result, written):
    names = {path.name for path in written.iterdir()}
    assert names == {
        "report.html", "report.json", "metrics", "losses.png", "loss_matrix.png", "gates.png",
        "forecasts.png", "training_curves.png",
    }  # fmt: skip
    assert json.loads((written / "report.json").read_text()) == result


def test_the_page_needs_no_other_file(written):
    text = (written / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "http" not in text.replace("data:image", "")
    assert "<script" not in text


def test_the_page_leads_with_the_honest_gain(result, written):
    text = (written / "report.html").read_text()
    lead = text.index("gain over the best anyone has alone")
    assert lead < text.index("Against the best specialist only")
    assert f"{result['gain_percent']['evidence']['vs_best_alone']:+.2f} %" in text
    parts = ("contamination", "Compute", "Time", "Generated text", "Provenance", "as many steps")
    for part in parts:
        assert part.lower() in text.lower()


def test_the_minimal_result_has_a_page_too(minimal, tmp_path):
    text = write_report(minimal, {}, tmp_path).read_text()
    assert "All methods" in text and "Compute" not in text


def test_names_from_outside_are_escaped(result, minimal, tmp_path):
    evil = "<script>alert(1)</script>"
    result["samples"][0]["text"] = evil + "\x1b[2J"
    named = {**minimal, "cooperative": evil, "samples": result["samples"]}
    text = write_report(named, {}, tmp_path).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "\x1b" not in text


def test_drawn_again_from_its_own_files_it_is_the_same(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    first = (tmp_path / "report.html").read_bytes()
    path = find_report(tmp_path)
    again = write_report(load_report(path), read_metrics(path.parent), path.parent)
    assert again.read_bytes() == first


def test_a_report_leaves_other_files_alone_and_takes_old_figures_away(
    result, metrics, written, tmp_path
):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "gates.png").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    write_report({**result, "gates": {}}, metrics, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "gates.png").exists()


def test_a_report_is_found_in_its_folder_or_beside(written, tmp_path):
    shutil.copytree(written, tmp_path / "demo" / "report")
    expected = tmp_path / "demo" / "report" / "report.json"
    for place in (tmp_path / "demo", expected.parent, expected):
        assert find_report(place) == expected
    with pytest.raises(ConfigError, match=r"Cannot find a report in .* got no such folder\."):
        find_report(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 1}', "\udcff"])
def test_a_file_that_is_no_report_is_refused(content, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_report(path)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_REPORT_BYTES", 3)
    path = tmp_path / "report.json"
    path.write_text("{}  ")
    with pytest.raises(ConfigError, match="expected at most 3 bytes, got 4"):
        load_report(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("losses", {"base": {}}),
        ("gain_percent", {}),
        ("forecasts", {"law": {"reference": None}}),
        ("domains", ["unheard-of"]),
        ("compute", {"contributors": {"a": {}}}),
    ],
)
def test_malformed_parts_are_refused_and_nothing_is_written(name, value, result, tmp_path):
    with pytest.raises(ConfigError, match=r"docs/report\.schema\.json"):
        write_report({**result, name: value}, {}, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_metrics_that_are_no_json_are_named(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "python.jsonl").write_text("{}\n{oops\n")
    with pytest.raises(ConfigError, match=r"python\.jsonl"):
        read_metrics(tmp_path)


def test_a_full_disk_is_one_line(result, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        write_report(result, {}, tmp_path / "report")
    assert [p for p in (tmp_path / "report").iterdir() if p.suffix != ".tmp"] == []
