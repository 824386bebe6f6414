import importlib
import json
import shutil

import pytest

from molora_fed.errors import PluginError
from molora_fed.storage import distributions
from molora_fed.storage.distributions import find_documentation, find_installed


def measure(packages, name="mine-a"):
    packages.refresh()
    return find_installed(name).hash()


def test_a_distribution_is_found_however_it_is_spelled(packages):
    packages.add("mine-a", version="1.2")
    assert find_installed("Mine_A").version == "1.2"
    assert find_installed("nobody-has-this") is None and find_installed("") is None


def test_the_hash_follows_the_code_and_nothing_else(packages):
    packages.add("mine-a")
    first = measure(packages)
    info = packages.root / "mine_a-0.1.0.dist-info"
    (info / "INSTALLER").write_text("another\n")
    (info / "METADATA").write_text((info / "METADATA").read_text() + "Summary: new\n")
    record = info / "RECORD"
    record.write_text("mine_a/old.pyc,,\n" + record.read_text())
    assert measure(packages) == first
    (info / "entry_points.txt").write_text("[molora_fed]\nmine-a = mine_a.work\n")
    assert measure(packages) != first
    packages.change("mine-a", "SHARPNESS = 2\n")
    changed = measure(packages)
    assert changed != first
    shutil.move(packages.root / "mine_a" / "work.py", packages.root / "mine_a" / "word.py")
    record.write_text(record.read_text().replace("work.py", "word.py"))
    assert measure(packages) != changed


def test_an_editable_install_has_the_hash_of_the_installed_package(packages):
    packages.add("mine-a")
    first = measure(packages)
    info = packages.root / "mine_a-0.1.0.dist-info"
    (info / "RECORD").write_text("__editable__.mine_a.pth,,\n")
    (info / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}, "url": "x"}))
    cache = packages.root / "mine_a" / "__pycache__"
    cache.mkdir()
    (cache / "work.cpython-311.pyc").write_bytes(b"compiled")
    assert measure(packages) == first
    (info / "RECORD").unlink()
    (info / "direct_url.json").unlink()
    assert measure(packages) == first


def test_a_distribution_of_one_module_is_hashed(packages):
    packages.add("mine-a")
    shutil.rmtree(packages.root / "mine_a")
    (packages.root / "mine_a.py").write_text("x = 1\n")
    info = packages.root / "mine_a-0.1.0.dist-info"
    (info / "RECORD").write_text("mine_a.py,,\n")
    first = measure(packages)
    (info / "RECORD").unlink()
    assert measure(packages) == first


def test_what_cannot_be_hashed_is_refused_in_one_line(packages, monkeypatch):
    packages.add("mine-a")
    (packages.root / "mine_a" / "work.py").unlink()
    with pytest.raises(PluginError, match=r"mine-a 0\.1\.0: expected the file mine_a/work\.py"):
        measure(packages)
    packages.add("mine-b")
    monkeypatch.setattr(distributions, "MAX_FILES", 1)
    with pytest.raises(PluginError, match="at most 1 files"):
        measure(packages, "mine-b")
    packages.remove("mine-b")
    packages._describe("mine-b", "0.1.0")
    (packages.root / "mine_b-0.1.0.dist-info" / "RECORD").unlink()
    importlib.invalidate_caches()
    with pytest.raises(PluginError, match="expected the module mine_b, got none"):
        measure(packages, "mine-b")


def test_documentation_is_what_the_metadata_says(packages):
    packages.add("mine-a", metadata="Project-URL: Homepage, https://a\n")
    assert find_documentation("mine-a") == "https://a"
    packages.add("mine-b", metadata="Project-URL: Source, s\nProject-URL: Documentation, d\n")
    assert find_documentation("mine-b") == "d"
    packages.add("mine-c")
    assert find_documentation("mine-c") is None and find_documentation("nobody-has-this") is None
