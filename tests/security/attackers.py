"""Attackers of a server in processes of its own: at its port, as members, and as a crowd."""

import contextlib
import re
import socket
import ssl
import threading
from base64 import b64encode
from pathlib import Path

import httpx
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from transport_helpers import StandInServer, wait_until

from molora_fed.federation.acceptance import accept_invitation
from molora_fed.federation.client_dialogue import answer
from molora_fed.federation.flower.node import FleetNode
from molora_fed.federation.homes import ContributorHome
from molora_fed.federation.invitations import make_invitation
from molora_fed.federation.join_settings import JoinSettings
from molora_fed.federation.letters import HELLO_PURPOSE, Greeting, Hello
from molora_fed.federation.signing import build_hello_bytes
from molora_fed.storage.keys import build_public_pem, load_key, sign

__all__ = ["Crowd", "Member", "Server", "build_head", "list_ports"]


class Server(StandInServer):
    """What an attacker asks of it, and what of that is in its log and in its folders."""

    @property
    def context(self):
        return ssl.create_default_context(cafile=str(self.home.root / "tls/authority.pem"))

    def ask_from(self, address, path, **options):
        """The status of a POST from an address; 0 if the server closed before it said one."""
        transport = httpx.HTTPTransport(verify=self.context, local_address=address)
        headers = {"content-type": "application/protobuf", **options.pop("headers", {})}
        with httpx.Client(transport=transport, timeout=60.0) as client:
            try:
                return client.post(self.url + path, headers=headers, **options).status_code
            except httpx.TransportError:
                return 0

    def connect(self, address, *, tls=True):
        """A connection of an attacker's own."""
        plain = socket.create_connection(("127.0.0.1", self.port), 20, (address, 0))
        return self.context.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain

    def invite(self, name, **options):
        server = f"127.0.0.1:{self.port}"
        return make_invitation(self.home, name, "python", server=server, **{"days": 1, **options})

    def read_log(self):
        return (self.home.logs / "link.log").read_text(errors="replace")

    def list_effects(self):
        """What members, mailboxes and the ledger's store hold, and nothing that only tells."""
        folders = (self.home.members, self.home.mail / "contributors", self.home.received)
        files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if path.name != "fault.json"}

    @contextlib.contextmanager
    def refusing(self, *words):
        """The block changes nothing, and leaves a line with these words in the log."""
        before, effects = len(self.read_log()), self.list_effects()
        yield

        def find():
            lines = self.read_log()[before:].splitlines()
            return any(all(word in line for word in words) for line in lines)

        try:
            wait_until(find, seconds=30, what=f"a line with {words}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.read_log()[before:]}") from error
        assert self.list_effects() == effects

    def measure(self, key):
        """A figure of the process on the network, bytes: VmRSS now, or VmHWM, its highest."""
        status = Path(f"/proc/{self.processes()['link'].pid}/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1_024


class Member:
    """An invited member whose node says whatever a test has it say."""

    def __init__(self, server, folder, name):
        self.server, self.name = server, name
        self.home = ContributorHome(folder / name)
        accept_invitation(server.invite(name), self.home)
        JoinSettings(name, "python").save(self.home.settings_file)
        self.home.board.prepare()
        self.node_key = load_key(self.home.node_key)
        self.pem = build_public_pem(self.node_key)
        self.say = self.greet
        self.is_let_in = False
        client = FleetHttpClient.from_server_address(
            f"127.0.0.1:{server.port}", False, self.home.authority_file.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self.node_key, self.node_key.public_key()),
            ],
        )  # fmt: skip
        self.node = FleetNode(
            client, self.pem, lambda letters: self.say(letters), threading.Event()
        )

    def greet(self, envelope):
        """Say hello as it should be said; and nothing to what comes then."""
        if envelope.find(Greeting) is None:
            self.is_let_in = True
            return None
        return answer(self.home, envelope)

    def hello(self, greeting, **changed):
        """A hello of this member for a greeting of any server."""
        key = load_key(self.home.key)
        said = {**greeting.to_json(), **changed}
        signed = build_hello_bytes(HELLO_PURPOSE, **said, name=self.name, domain="python")
        return Hello(
            purpose=HELLO_PURPOSE, public_key=build_public_pem(key), name=self.name,
            domain="python", signature=sign(key, signed),
        )  # fmt: skip

    def enter(self):
        """Come online, and say hello until it is let in."""
        self.say, self.is_let_in = self.greet, False
        self.node.activate()
        wait_until(lambda: self.node.answer_one() and self.is_let_in, what="being let in")

    def talk(self, say):
        """Answer one message."""
        self.say = say
        wait_until(self.node.answer_one, what="a message")

    def sign(self, *, at=None, key=None):
        """The headers of a request that its node signs."""
        time = (at or now()).isoformat()
        signature = sign_message(key or self.node_key, time.encode())
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.pem.encode()).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
            TIMESTAMP_HEADER: time,
        }

    @property
    def activation(self):
        request = ActivateNodeRequest(public_key=self.pem.encode(), heartbeat_interval=30)
        return request.SerializeToString()


class Crowd:
    """A thousand connections that say nothing; whichever is closed is opened again."""

    def __init__(self, server, address, *, with_tls):
        self._server, self._address, self._with_tls = server, address, with_tls
        self._stop, self.is_there = threading.Event(), threading.Event()
        self.num_opened = 0
        self._held = [None] * 1_000
        self._thread = threading.Thread(target=self._hold)

    def __enter__(self):
        self._thread.start()
        assert self.is_there.wait(120)
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        for connection in self._held:
            if connection is not None:
                connection.close()

    def _hold(self):
        while not self._stop.is_set():
            for number, connection in enumerate(self._held):
                if self._stop.is_set():
                    return
                if connection is None or _is_closed(connection):
                    self._held[number] = self._open(number)
            self.is_there.set()
            self._stop.wait(0.2)

    def _open(self, number):
        try:
            tls = number < self._with_tls
            connection = self._server.connect(self._address, tls=tls)
        except OSError:
            return None
        self.num_opened += 1
        connection.setblocking(False)
        return connection


def _is_closed(connection):
    try:
        closed = connection.recv(1) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        closed = True
    if closed:
        connection.close()
    return closed


def build_head(path, headers):
    lines = (f"{name}: {value}" for name, value in {"host": "127.0.0.1", **headers}.items())
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


def list_ports(process):
    own = [process, *process.children(recursive=True)]
    return {c.laddr.port for p in own for c in p.net_connections() if c.status == "LISTEN"}
