"""Nobody runs code on anybody: not through the ports, not by an app that is sent."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from transport_helpers import CLOSED_PATHS, StandInServer, wait_until

from molora_fed.federation import flower
from molora_fed.federation.contributor import NODE_MODULE
from molora_fed.federation.flower import FLOWER_VERSION
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.join_settings import JoinSettings, prepare_home
from molora_fed.federation.supervise import ProcessGroup, build_flower_environment
from molora_fed.serving.addresses import find_free_port, is_healthy
from molora_fed.storage.keys import build_public_pem, load_key

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with StandInServer(tmp_path_factory.mktemp("c1") / "server") as running:
        yield running


@pytest.mark.parametrize(("method", "path"), CLOSED_PATHS)
def test_a_stranger_finds_the_fleet_only(server, method, path):
    assert server.ask(method, path) in (404, 429)


def test_a_page_of_another_host_is_not_answered(server):
    headers = {"host": "attacker.example", "content-type": "application/x-protobuf"}
    assert server.ask("GET", "/health", headers=headers) == 421
    assert server.ask("GET", "/health") == 200


def as_nobody(check):
    """Run a check as another user of this machine; the exit status says whether it held."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65_534)
            os.setuid(65_534)
            status = 0 if check() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_reaches_neither_control_nor_files(server):
    def finds_nothing():
        codes = {server.ask(method, path) for method, path in CLOSED_PATHS}
        try:
            os.listdir(server.home.root)
        except PermissionError:
            return codes <= {404, 429}
        return False

    for folder in server.home.root.parents:  # pytest's own folders are closed, too
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(0o755)
    assert as_nobody(finds_nothing) == 0


def test_the_servers_process_cannot_open_what_it_need_not(server):
    link = server.processes()["link"]
    status = Path(f"/proc/{link.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "not confined" not in (server.home.logs / "link.log").read_text()


EVIL_APP = """
import pathlib, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

pathlib.Path({marker!r}).joinpath("imported").touch()
server = ServerApp()
client = ClientApp()


@client.query()
def answer(message, context):
    pathlib.Path({marker!r}).joinpath("ran-on-node-" + str(context.node_id)).touch()
    return Message(message.content, reply_to=message)


@server.main()
def main(grid, context):
    sent = {{}}
    while True:
        for node in grid.get_node_ids():
            if node not in sent:
                content = RecordDict({{"x": ConfigRecord({{"y": 1}})}})
                (sent[node],) = grid.push_messages([Message(content, node, "query", ttl=60.0)])
        for reply in grid.pull_messages(list(sent.values())):
            said = str(reply.error.reason) if reply.has_error() else "answered"
            name = "heard-" + str(reply.metadata.src_node_id) + "-" + said
            pathlib.Path({marker!r}).joinpath(name).touch()
        time.sleep(0.3)
"""
EVIL_PROJECT = """
[project]
name = "molora-fed"
version = "0.1.0"
description = "Mailboxes of molora-fed; or so it says."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "molora"
[tool.flwr.app.components]
serverapp = "evil:server"
clientapp = "evil:client"
"""


def test_a_server_that_sends_another_app_runs_nothing_here(tmp_path):
    """Flower's own SuperLink, which starts an app of its operator's on every node it has."""
    app, marker, home = tmp_path / "app", tmp_path / "marker", ContributorHome(tmp_path / "home")
    for folder in (app, marker, tmp_path / "flower"):
        folder.mkdir()
    (app / "pyproject.toml").write_text(EVIL_PROJECT)
    (app / "evil.py").write_text(EVIL_APP.format(marker=str(marker)))
    prepare_home(home, JoinSettings("alice", "python"))
    port = find_free_port()
    address = f"127.0.0.1:{port}"
    (tmp_path / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "l"\n[superlink.l]\naddress = "{address}"\ninsecure = true\n'
    )
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = build_flower_environment(tmp_path, PATH=scripts)
    group = ProcessGroup(tmp_path / "logs", tmp_path / "processes.json")
    try:
        group.start("superlink", ["flower-superlink", "--insecure", "--port", str(port)], env)
        wait_until(lambda: is_healthy("127.0.0.1", port), what="the SuperLink")
        with ControlHttpClient.from_server_address(address, True, None, interceptors=[]) as control:
            key = build_public_pem(load_key(home.node_key)).encode()
            control.RegisterNode(RegisterNodeRequest(public_key=key))
        subprocess.run(["flwr", "run", str(app), "l"], env=env, check=True, capture_output=True)
        for path in marker.iterdir():
            path.unlink()  # submitting imports it, too
        ours = [sys.executable, "-P", "-m", NODE_MODULE, str(home.root), address]
        group.start("node", [*ours, str(home.node_key)], env)
        heard = wait_until(lambda: list(marker.glob("heard-*")), what="our answer")
        assert [path.name.rpartition("-")[2] for path in heard] == ["not answered"]
        assert "not understood" in group.log("node").read_text()
        assert not list(marker.glob("ran-on-node-*"))
        node = psutil.Process(group.pid("node"))
        own = [node, *node.children(recursive=True)]
        assert [c for p in own for c in p.net_connections() if c.status == "LISTEN"] == []
        assert not (home.root / "flower").exists()

        # The same server, and Flower's own node: this is what is not to happen.
        flowers = ["flower-supernode", "--insecure", "--superlink", address]
        group.start("flowers", [*flowers, "--port", str(find_free_port())], env)
        wait_until(lambda: list(marker.glob("ran-on-node-*")), what="the app on Flower's node")
    finally:
        group.stop_all()


def test_flower_is_the_version_whose_internals_are_used():
    """Another version needs another look at all of `molora_fed/federation/flower`."""
    assert importlib.metadata.version("flwr") == FLOWER_VERSION


def test_nothing_else_uses_flowers_internals():
    allowed = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    package = Path(flower.__file__).parent
    for path in package.parents[1].rglob("*.py"):
        if path.is_relative_to(package):
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and words[1].split(".")[0] == "flwr":
                assert words[1] in allowed, f"{path}: {line}"
