"""Wrong arguments: one line on standard error, the error's exit code, nothing half-written."""

import types

import pytest
from molora_cli import main

from molora_fed.cooperative.cooperative import open_cooperative
from molora_fed.errors import PluginError
from molora_fed.plugins import get_plugins, hookimpl, load_plugins

WRONG = {
    "coop-name": (11, "coop create Bad_Name --base {base} --folder {out}"),
    "coop-base": (13, "coop create one --base {missing} --folder {out}"),
    "coop-router": (61, "coop create one --base {base} --folder {out} --router evidense"),
    "coop-kind": (11, "coop create one --base {base} --folder {out} --kind lor"),
    "coop-depth": (11, "coop create one --base {base} --folder {out} --frozen-depth 9"),
    "coop-size": (11, "coop create one --base {base} --folder {out} --block-size 4096"),
    "coop-domain": (11, "coop create one --base {base} --folder {out} --domains a.b"),
    "coop-other": (11, "coop create one --base {base} --folder {coop}"),
    "train-charter": (11, "train --cooperative {missing} --domain abc --out {out}"),
    "train-domain": (61, "train --cooperative {coop} --domain abc --out {out}"),
    "train-data": (12, "train --cooperative {coop} --domain abc --data {missing} --out {out}"),
    "train-empty": (12, "train --cooperative {coop} --domain abc --data {empty} --out {out}"),
    "train-small": (12, "train --cooperative {coop} --domain abc --data {text} --out {out}"),
    "train-kind": (
        10, "train --cooperative {coop} --domain abc --data {data} --out {out} --kind x",
    ),
    "train-name": (
        10, "train --cooperative {coop} --domain abc --data {data} --out {out} --name base",
    ),
    "train-base": (
        13, "train --cooperative {coop} --base {missing} --domain abc --data {data} --out {out}",
    ),
    "train-shard": (10, "train --cooperative {coop} --domain abc --out {out} --shard 3/2"),
    "train-launcher": (10, "train --cooperative {coop} --domain abc --out {out} --launcher nix"),
    "train-launcher-quote": (
        10, "train --cooperative {coop} --domain abc --out {out} --launcher 'nix",
    ),
    "join-launcher": (
        10, "join --server 127.0.0.1:1 --domain abc --home {out} --yes --launcher nix",
    ),
    "join-shard": (10, "join --server 127.0.0.1:1 --domain abc --home {out} --yes --shard a"),
    "fuse-missing": (20, "fuse --cooperative {coop} {missing} --out {out}"),
    "fuse-none": (10, "fuse --cooperative {coop} --out {out}"),
    "evaluate-data": (10, "evaluate {missing} --data nothing"),
    "evaluate-path": (10, "evaluate {missing} --data name={missing}"),
    "evaluate-model": (10, "evaluate {missing} --data name={data}"),
    "generate": (10, "generate {missing} --prompt x"),
    "export": (10, "export {missing} --to peft --out {out}"),
    "export-base": (10, "export {coop} --to merged --out {out}"),
    "export-full": (10, "export {coop} --to gguf --out {data}"),
    "report": (10, "report {empty}"),
    "serve": (11, "serve {empty}"),
    "serve-host": (10, "serve {coop} --insecure --host 0.0.0.0"),
    "serve-address": (10, "serve {coop} --insecure --address fed.example"),
    "serve-port": (10, "serve {coop} --address fed.example:x"),
    "invite-none": (11, "coop invite {empty} --name a --domain abc"),
    "invite-name": (10, "coop invite {coop} --name A --domain abc"),
    "invite-days": (10, "coop invite {coop} --name a --domain abc --days 0"),
    "revoke": (10, "coop revoke {coop} nobody"),
    "join-nothing": (10, "join --yes --home {out}"),
    "join-line": (10, "join molora1.e30.00000000 --yes --home {out}"),
    "join-file": (10, "join {missing} --yes --home {out}"),
    "join-domain": (10, "join --server 127.0.0.1:1 --yes --home {out}"),
    "join-both": (10, "join x --server 127.0.0.1:1 --domain abc --yes --home {out}"),
    "join-ask": (10, "join --server 127.0.0.1:1 --domain abc --home {out}"),
    "join-server": (10, "join --server nowhere:x --domain abc --home {out} --yes"),
    "join-host": (10, "join --server 192.0.2.1:80 --domain abc --home {out} --yes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_is_one_line_and_leaves_nothing(case, molora, setup, tmp_path, tiny_checkpoint):
    (tmp_path / "empty").mkdir()
    places = {
        "base": tiny_checkpoint(), "coop": setup.cooperative, "missing": tmp_path / "missing",
        "empty": tmp_path / "empty", "out": tmp_path / "out", "data": setup.texts["abc"],
        "text": setup.texts["abc"] / "000.txt",
    }  # fmt: skip
    code, command = WRONG[case]
    ran = molora(*(part.format(**places) for part in command.split()))
    assert ran.code == code, ran.err
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))
    assert open_cooperative(setup.cooperative)


def test_usage_errors_name_the_option(molora):
    ran = molora("train", "--domain", "abc")
    assert ran.code == 2
    assert "--cooperative" in ran.err


def test_unexpected_error_is_one_line_and_traceback_on_request(molora, monkeypatch):
    def fail():
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("molora_fed.plugins.get_plugins", fail)
    monkeypatch.delenv(main.DEBUG, raising=False)
    ran = molora("plugins", "list")
    assert ran.code == 1
    assert ran.err.startswith("error: Unexpected ZeroDivisionError: by zero.")
    assert len(ran.err.splitlines()) == 1
    monkeypatch.setenv(main.DEBUG, "1")
    assert "Traceback" in molora("plugins", "list").err


def test_disk_error_is_one_line(molora, setup, tmp_path):
    (tmp_path / "file").write_text("")
    ran = molora(
        "train", "--cooperative", setup.cooperative, "--domain", "abc", "--data",
        setup.texts["abc"], "--out", tmp_path / "file" / "out",
    )  # fmt: skip
    assert ran.code == 14
    assert len(ran.err.splitlines()) == 1


def test_plugins_list_shows_origin_and_check_resolves_all(molora):
    listed, checked = molora("plugins", "list"), molora("plugins", "list", "--check")
    assert (listed.code, checked.code, checked.err) == (0, 0, "")
    assert len(listed.out.splitlines()) == len(get_plugins().found) + 1
    assert all(line.split()[4] == "ok" for line in checked.out.splitlines()[1:])


def test_plugins_check_ends_with_60_if_one_fails(molora, monkeypatch):
    plugin = types.ModuleType("test")
    plugin.register_domains = hookimpl(
        lambda register: register(
            "bad", "molora_fed.nowhere:attribute", summary="Bad", source="none"
        )
    )
    broken = load_plugins(extra=[("test", plugin)])
    broken.failures.append(PluginError("Cannot load plugin other: it is broken."))
    monkeypatch.setattr("molora_fed.plugins.get_plugins", lambda: broken)
    listed, checked = molora("plugins", "list"), molora("plugins", "list", "--check")
    assert listed.code == 0
    assert listed.err == "Cannot load plugin other: it is broken.\n"
    assert checked.code == 60
    assert "FAILED" in checked.out
    assert len(checked.err.splitlines()) == 2  # the plugin that did not load, and the error
    assert "other" in checked.err
    assert "nowhere" in checked.err
