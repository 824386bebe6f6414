"""The place of the TLS gateway: until it exists, a server listens on this machine only.

Flower serves three interfaces on one port and can authenticate only one of them: whoever reaches
the port may run code on the server and on every contributor. So nothing but loopback is allowed
until a gateway forwards `/v1/fleet/` alone, under TLS.
"""

import ipaddress

from molora_fed.errors import ConfigError

__all__ = ["check_loopback", "parse_server"]

DEFAULT_PORT = 8_080


def check_loopback(host: str) -> None:
    """Refuse every host but this machine, by its IPv4 loopback address or as localhost.

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
        f"Cannot use host '{host}': expected a loopback address, got another machine's; Flower's "
        "control interface on that port is open to whoever reaches it. Use 127.0.0.1, or a "
        "tunnel, until the TLS gateway exists."
    )


def parse_server(server: str) -> tuple[str, int]:
    """Split "HOST:PORT" and check that the host is allowed.

    Raises:
        ConfigError: If it is malformed or not on this machine.
    """
    host, separator, port = server.removeprefix("http://").rstrip("/").rpartition(":")
    if not separator:
        host, port = port, str(DEFAULT_PORT)
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536 or not host:
        raise ConfigError(
            f"Cannot use server '{server}': expected HOST:PORT, got something else. "
            f"Try 127.0.0.1:{DEFAULT_PORT}."
        )
    check_loopback(host)
    return host, int(port)
