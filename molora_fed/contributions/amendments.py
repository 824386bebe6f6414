"""Signed amendments: what may change of a charter, numbered, under the coordinator's key."""

from dataclasses import dataclass

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
        amendment: What counts from now on, whole.
        signature: Hex signature.
    """

    identity_hash: str
    amendment: Amendment
    signature: str

    def check(self, coordinator_key: str) -> None:
        """Refuse it unless the coordinator signed it for this charter.

        Args:
            coordinator_key: The coordinator's public key, PEM.

        Raises:
            SignatureError: If the signature does not verify.
        """
        verify(
            coordinator_key,
            _signed_bytes(self.identity_hash, self.amendment),
            self.signature,
            what=f"amendment {self.amendment.number}",
        )


def sign_amendment(
    key: EllipticCurvePrivateKey, identity_hash: str, amendment: Amendment
) -> SignedAmendment:
    """Sign an amendment with the coordinator's key."""
    return SignedAmendment(
        identity_hash, amendment, sign(key, _signed_bytes(identity_hash, amendment))
    )


def _signed_bytes(identity_hash: str, amendment: Amendment) -> bytes:
    return canonical_json(
        {"charter_identity": identity_hash, "amendment": amendment.model_dump(mode="json")}
    )
