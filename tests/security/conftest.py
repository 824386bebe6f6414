"""What the security tests share."""

from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def plain_relay(monkeypatch):
    """Messages without a run of Flower; and a relay that pauses for nobody."""
    from molora_fed.federation import server_app

    def build(content, *, dst_node_id, **more):
        return SimpleNamespace(content=content, metadata=SimpleNamespace(dst_node_id=dst_node_id))

    monkeypatch.setattr(server_app, "Message", build)
    monkeypatch.setenv("MOLORA_MESSAGE_BYTES", "4096")
    for name in ("PAUSE_SECONDS", "MAX_PAUSE_SECONDS"):
        monkeypatch.setattr(server_app, name, 0.0, raising=False)
