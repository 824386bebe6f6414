"""Servers' addresses: parsed, checked, and asked whether somebody answers. No torch, no flwr."""

import http.client
import ipaddress
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from molora_fed.errors import ConfigError, PortTakenError

__all__ = [
    "DEFAULT_PORT",
    "check_loopback",
    "check_port_free",
    "find_free_port",
    "find_trouble",
    "format_server",
    "is_healthy",
    "parse_server",
]

DEFAULT_PORT = 8_080
_OTHER_TIMES = (9, 10)  # OpenSSL's codes: not yet valid, expired


def check_loopback(host: str) -> None:
    """Refuse every host but this machine, by its IPv4 loopback address or as localhost.

    Without TLS anybody on the way reads and changes what is sent, and without invitations anybody
    may join; so both are for one machine only.

    Raises:
        ConfigError: If the host is not a loopback address.
    """
    if host == "localhost":
        return
    try:
        if ipaddress.IPv4Address(host).is_loopback:
            return
    except ValueError:
        pass
    raise ConfigError(
        f"Cannot use host '{host}' without TLS: expected a loopback address, got another "
        "machine's. Use 127.0.0.1, or serve without --insecure and join with an invitation."
    )


def parse_server(server: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """Split "HOST:PORT"; a port that is left out is the default.

    Raises:
        ConfigError: If it is malformed.
    """
    host, separator, port = server.removeprefix("http://").rstrip("/").rpartition(":")
    if not separator:
        host, port = port, str(default_port)
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536 or not host:
        raise ConfigError(
            f"Cannot use server '{server}': expected HOST:PORT, got something else. "
            f"Try 127.0.0.1:{DEFAULT_PORT}."
        )
    return host.strip("[]"), int(port)


def format_server(host: str, port: int) -> str:
    """Host and port as one text, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port_free(host: str, port: int, *, option: str = "--port") -> None:
    """Check that nobody listens on a port.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        option: The option that chooses another.

    Raises:
        PortTakenError: If somebody does, or the port may not be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTakenError(
                f"Cannot serve on port {port}: expected a free port on {host}, got "
                f"{error.strerror}. Stop the program that uses it, or choose another with {option}."
            ) from error


def find_free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_healthy(
    host: str, port: int, authority: Path | None = None, *, timeout_seconds: float = 2.0
) -> bool:
    """Whether a server answers there; the arguments are those of `find_trouble`."""
    return not find_trouble(host, port, authority, timeout_seconds=timeout_seconds)


def find_trouble(
    host: str, port: int, authority: Path | None = None, *, timeout_seconds: float = 2.0
) -> str:
    """Why a server does not answer there as it should, in a few words; empty if it does.

    Args:
        host: Its address.
        port: Its port.
        authority: Certificate of the authority that vouches for it, PEM; None asks without TLS.
        timeout_seconds: How long to wait.
    """
    scheme, context = "http", None
    try:
        if authority is not None:
            scheme, context = "https", ssl.create_default_context(cafile=str(authority))
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        url = f"{scheme}://{format_server(host, port)}/health"
        with urllib.request.urlopen(url, timeout=timeout_seconds, context=context) as answer:
            return "" if answer.status == 200 else f"status {answer.status}"
    except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None)
        if getattr(reason, "verify_code", 0) in _OTHER_TIMES:
            return "a certificate that is not good at this machine's time: check both clocks"
        return "no answer"
