"""The server's process on the network: gateway, the fleet's interface behind it, mail relay.

    python -P -m molora_fed.federation.flower.link HOME HOST PORT [--names NAME ...] [--open]

It reads the base and the server's certificate and changes mail and members only: neither the
coordinator's signing key nor ledger nor contributions (see `confine`). Nothing it serves starts a
program.
"""

import argparse
import asyncio
import os
import signal
import ssl
import threading
import time
import traceback
from pathlib import Path

from starlette.datastructures import Headers

from molora_fed.federation.certificates import ServerCertificate
from molora_fed.federation.confine import confine
from molora_fed.federation.flower.fleet import FLEET_BODIES, build_fleet_app, read_node_key
from molora_fed.federation.flower.grid import LinkGrid, build_state_factory
from molora_fed.federation.gateway import Gateway
from molora_fed.federation.homes import CoordinatorHome
from molora_fed.federation.invitations import answer_redemption
from molora_fed.federation.logs import log, start_logging, take_records
from molora_fed.federation.members import Members
from molora_fed.federation.server_app import carry_mail
from molora_fed.serving.connections import Doorkeeper, build_server, run_server
from molora_fed.serving.refusals import FewRefusals
from molora_fed.storage.files import hash_bytes

LOOK_SECONDS = 60.0
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


def _serve(home: CoordinatorHome, host: str, port: int, names: list[str], is_open: bool) -> None:
    """Serve until told to end.

    Args:
        home: The coordinator's home.
        host: Address to listen on.
        port: Port to listen on.
        names: Names and addresses by which contributors reach it.
        is_open: Plain HTTP for whoever is on this machine, instead of TLS for members.
    """
    certificate = None if is_open else ServerCertificate(home.root)
    members = None if is_open else Members(home.members)
    read = [home.base, *([] if certificate is None else certificate.files)]
    problem = confine(read=read, write=[home.mail, home.members], network=True)
    if problem:
        log("not confined", "warning", reason=problem)
    factory = build_state_factory()
    is_member = (lambda key: True) if members is None else lambda key: members.find(key) is not None
    grid = LinkGrid(factory.state(), is_member)
    relay = threading.Thread(target=_carry, args=(home, grid, members), daemon=True)
    on_refusal = FewRefusals(_log_refusal)
    doorkeeper = Doorkeeper(on_refusal=on_refusal)

    def identify(headers: Headers) -> str:
        key = read_node_key(headers)
        return hash_bytes(key.encode()) if key and is_member(key) else ""

    async def redeem(body: bytes) -> object:
        assert members is not None and certificate is not None
        return await asyncio.to_thread(
            answer_redemption, body, members, home, certificate.authority
        )

    gateway = Gateway(
        build_fleet_app(factory),
        bodies=FLEET_BODIES,
        hosts=frozenset({*LOOPBACK_NAMES, *names}),
        identify=identify,
        redeem=None if is_open else redeem,
        on_member=doorkeeper.welcome,
        on_refusal=on_refusal,
    )
    relay.start()
    server = build_server(
        gateway,
        host=host,
        port=port,
        doorkeeper=doorkeeper,
        certificate=None if certificate is None else certificate.paths,
    )
    take_records("flwr", "uvicorn.error", "asyncio")
    if certificate is not None:
        _watch_certificate(server.config.ssl, certificate)
    run_server(server, on_refusal)


def _log_refusal(address: str, path: str, status: int, reason: str) -> None:
    log("refused", "warning", address=address, path=path, status=status or None, reason=reason)


def _carry(home: CoordinatorHome, grid: LinkGrid, members: Members | None) -> None:
    """Carry mail; the process ends with it, and its supervisor starts another."""
    try:
        carry_mail(home, grid, run_id=grid.run_id, members=members)
    except BaseException:
        log("mail ended by an error", "error", trace=traceback.format_exc())
        os._exit(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _watch_certificate(context: ssl.SSLContext | None, certificate: ServerCertificate) -> None:
    """Use a renewed certificate for new connections."""
    assert context is not None
    chain, key = certificate.paths

    def watch() -> None:
        seen = Path(chain).stat().st_mtime_ns
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                now = Path(chain).stat().st_mtime_ns
                if now != seen:
                    context.load_cert_chain(chain, key)
                    seen = now
            except OSError as error:
                log("certificate not renewed", "error", reason=error)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--open", action="store_true")
    arguments = parser.parse_args()
    start_logging("link")
    _serve(
        CoordinatorHome(arguments.home),
        arguments.host,
        arguments.port,
        arguments.names,
        arguments.open,
    )
