"""Signed amendments: what may change of a charter, numbered, under the coordinator's key."""

import json
from dataclasses import dataclass
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from molora_fed.charter import Amendment
from molora_fed.contributions.keys import sign, verify
from molora_fed.files import canonical_json

__all__ = ["SignedAmendment", "sign_amendment"]


@dataclass(frozen=True)
class SignedAmendment:
    """An amendment and the coordinator's signature over it and the charter's identity.

    Attributes:
        identity_hash: Identity of the charter it amends.
        text: The amendment's canonical JSON as it was signed; an earlier version wrote fewer keys,
            so that it cannot be made again from the amendment.
        signature: Hex signature.
    """

    identity_hash: str
    text: str
    signature: str

    @cached_property
    def amendment(self) -> Amendment:
        """What counts from now on, whole."""
        return Amendment.model_validate_json(self.text)

    def check(self, coordinator_key: str) -> None:
        """Refuse it unless the coordinator signed it for this charter.

        Args:
            coordinator_key: The coordinator's public key, PEM.

        Raises:
            SignatureError: If the signature does not verify.
        """
        verify(
            coordinator_key,
            _signed_bytes(self.identity_hash, self.text),
            self.signature,
            what=f"amendment {self.amendment.number}",
        )


def sign_amendment(
    key: EllipticCurvePrivateKey, identity_hash: str, amendment: Amendment
) -> SignedAmendment:
    """Sign an amendment with the coordinator's key."""
    text = canonical_json(amendment.model_dump(mode="json")).decode()
    return SignedAmendment(identity_hash, text, sign(key, _signed_bytes(identity_hash, text)))


def _signed_bytes(identity_hash: str, text: str) -> bytes:
    return canonical_json({"charter_identity": identity_hash, "amendment": json.loads(text)})
