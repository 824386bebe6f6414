"""The server's connections: silent ones end, too many cost strangers and not members."""

import contextlib
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from transport_helpers import serving as serve_app

from molora_fed.federation.certificates import ServerCertificate, hash_certificate
from molora_fed.serving.connections import Doorkeeper


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def read_all(connection):
    """What comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1_000):
            data += piece
    return data


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_head_that_does_not_come_ends_the_connection(start):
    with serve_app(answer, Doorkeeper(head_seconds=0.2)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
            silent.sendall(start)
            assert read_all(silent) == b""
        # A connection that has asked stays for the next question.
        with httpx.Client() as client:
            for _ in range(2):
                assert client.get(f"http://127.0.0.1:{port}/").text == "ok"


def test_too_many_connections_cost_the_oldest_strangers_not_members():
    doorkeeper = Doorkeeper(most=10)
    with serve_app(answer, doorkeeper) as port, httpx.Client() as client:
        assert client.get(f"http://127.0.0.1:{port}/").text == "ok"
        (address,) = doorkeeper._open
        doorkeeper.welcome(address)
        silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(50)]
        assert read_all(silent[0]) == b""
        assert client.get(f"http://127.0.0.1:{port}/").text == "ok"
        assert address in doorkeeper._open and len(doorkeeper) == 10
        for each in silent:
            each.close()


def test_tls_is_of_the_cooperatives_own_authority_and_is_renewed(tmp_path):
    certificate = ServerCertificate(tmp_path)
    certificate.prepare(["fed.example", "127.0.0.1"])
    first = [Path(path).read_bytes() for path in certificate.paths]
    certificate.prepare(["fed.example", "127.0.0.1"])
    assert [Path(path).read_bytes() for path in certificate.paths] == first
    authority = certificate.prepare_authority()
    assert authority == hash_certificate(certificate.authority)
    context = ssl.create_default_context(cafile=str(certificate.authority_file))
    with serve_app(answer, Doorkeeper(), certificate.paths) as port:
        answered = httpx.get(f"https://127.0.0.1:{port}/", verify=context)
        assert answered.text == "ok"
        with pytest.raises(httpx.ConnectError, match="localhost"):
            httpx.get(f"https://localhost:{port}/", verify=context)
        # A connection without a handshake does not keep others from theirs.
        with socket.create_connection(("127.0.0.1", port)):
            assert httpx.get(f"https://127.0.0.1:{port}/", verify=context).text == "ok"
    certificate.prepare(["127.0.0.1"])  # other names: another certificate of the same authority
    assert [Path(path).read_bytes() for path in certificate.paths] != first
    assert certificate.prepare_authority() == authority
    for path in (tmp_path / "keys" / "authority.pem", certificate.paths[1]):
        assert Path(path).read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert (tmp_path / "keys" / "authority.pem").stat().st_mode & 0o077 == 0
    assert (tmp_path / "tls" / "server.key").stat().st_mode & 0o077 == 0


def test_a_certificate_near_its_end_is_renewed(tmp_path, monkeypatch):
    from molora_fed.federation import certificates

    certificate = ServerCertificate(tmp_path)
    monkeypatch.setattr(certificates, "SERVER_DAYS", 29)
    certificate.prepare(["a"])
    first = Path(certificate.paths[0]).read_bytes()
    monkeypatch.setattr(certificates, "SERVER_DAYS", 90)
    certificate.prepare(["a"])
    assert Path(certificate.paths[0]).read_bytes() != first
