"""Nobody runs code on anybody: what the ports of server and contributor answer to strangers."""

import pytest
from transport_helpers import CLOSED_PATHS, StandInServer

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with StandInServer(tmp_path_factory.mktemp("c1") / "server") as running:
        yield running


@pytest.mark.parametrize(("method", "path"), CLOSED_PATHS)
def test_a_stranger_finds_the_fleet_only(server, method, path):
    assert server.ask(method, path) == 404


def test_a_page_of_another_host_is_not_answered(server):
    headers = {"host": "attacker.example", "content-type": "application/x-protobuf"}
    assert server.ask("GET", "/health", headers=headers) == 421
    assert server.ask("GET", "/health") == 200
