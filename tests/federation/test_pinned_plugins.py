"""A member without the plugins that its charter pins goes no further; neither does a server."""

import os
import subprocess
import sys

import pytest
from plugin_packages import WORK
from process_helpers import find_processes, wait_until
from stage_helpers import TRAINING, Stage

from molora_fed.charter import Amendment, FusionRules
from molora_fed.errors import PluginError
from molora_fed.federation.doctor import examine
from molora_fed.federation.server_dialogue import RemoteContributor
from molora_fed.federation.worker import ContributorWorker
from molora_fed.plugins import load_plugins
from molora_fed.serving.addresses import find_free_port


@pytest.fixture
def stage(tmp_path, packages, tiny_checkpoint):
    packages.add("mine-a")
    amendment = Amendment(
        training=TRAINING, fusion=FusionRules(router="mine-a", compare=("evidence",))
    )
    plugins = load_plugins()
    return Stage(tmp_path / "stage", tiny_checkpoint("gpt_neox"), amendment, plugins=plugins)


def take_charter(stage, who):
    home, line = stage.make(who), RemoteContributor()
    stage.carry(home, line)
    wait_until(lambda: stage.carry(home, line) or home.charter_letter.exists(), what="the charter")
    return home


def look(home):
    found = [one for one in examine(home, load_plugins()) if one.subject == "pinned plugins"]
    return [(one.message, one.is_problem) for one in found]


def test_a_member_checks_the_pins_before_it_reads_any_text(stage, packages):
    home = take_charter(stage, "alpha")
    packages.change("mine-a", WORK + "# changed\n")
    with pytest.raises(PluginError, match=r"expected the plugin mine-a 0\.1\.0 with the hash"):
        list(ContributorWorker(home, load_plugins()).steps())
    assert not home.corpus.exists() and not home.offer_file.exists()
    ((message, is_problem),) = look(home)
    assert is_problem and "with the hash" in message
    packages.change("mine-a", WORK)
    assert next(ContributorWorker(home, load_plugins()).steps()) is None  # waits for the base
    assert look(home) == look(stage.server) == [("mine-a 0.1.0", False)]


@pytest.mark.processes
def test_a_join_without_the_plugin_ends_with_the_package_to_install(stage, packages, tmp_path):
    site, server = packages.root, stage.server
    port = find_free_port()
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*arguments, **more):
        return subprocess.Popen(
            [sys.executable, "-m", "molora_cli.main", *map(str, arguments)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**plain, **more},
        )  # fmt: skip

    stage.make("alpha")  # its text
    serving = start("serve", server.root, "--port", port, "--insecure", PYTHONPATH=str(site))
    try:
        wait_until(lambda: server.read_state().get("phase") or serving.poll(), what="the server")
        joining = start(
            "join", "--server", f"127.0.0.1:{port}", "--domain", "alpha", "--data",
            stage.root / "text" / "alpha", "--home", tmp_path / "home", "--yes",
        )  # fmt: skip
        _, said = joining.communicate(timeout=120)
        assert joining.returncode == PluginError.exit_code, said
        assert said.splitlines()[-1] == (
            "error: Cannot use charter 'test': expected the plugin mine-a 0.1.0, got none "
            "installed. Install the charter's with `pip install mine-a==0.1.0`. Or have the "
            "coordinator pin another with `molora coop amend --pin`."
        )
    finally:
        serving.terminate()
        serving.communicate(timeout=60)
    assert not find_processes(tmp_path / "home")
    packages.remove("mine-a")
    unserved = start("serve", server.root, "--port", port, "--insecure")
    _, said = unserved.communicate(timeout=120)
    assert unserved.returncode == PluginError.exit_code
    assert "expected the plugin mine-a 0.1.0, got none installed" in said.splitlines()[-1]
