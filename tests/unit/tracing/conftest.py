from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from molora_fed.storage.keys import build_public_pem
from molora_fed.tracing.writing import SyncPolicy, TraceWriter


@pytest.fixture(scope="session")
def key() -> ec.EllipticCurvePrivateKey:
    """Key of a coordinator; the same in every run of the tests."""
    return ec.derive_private_key(20_261_122, ec.SECP384R1())


@pytest.fixture(scope="session")
def public(key) -> str:
    """Its public half, PEM."""
    return build_public_pem(key)


@pytest.fixture(scope="session")
def write(key) -> Callable[..., None]:
    """`write(folder, count, writer=, run_id=, salt=, **policy)`: one opening of a writer."""

    def write(folder: Path, count=10, *, writer="main", run_id="run", salt=0, **policy) -> None:
        with TraceWriter(
            folder, key=key, run_id=run_id, writer=writer, sync=SyncPolicy(**policy)
        ) as trace:
            for number in range(count):
                body = {"task": f"{writer}-{number}", "text": "ä\ud800" * 3, "salt": salt}
                trace.append("decision", body)

    return write
