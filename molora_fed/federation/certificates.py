"""A cooperative's own certificate authority, and the server certificate it signs.

Contributors learn the authority's hash from their invitation and trust nobody else's. The
authority lasts ten years and is never renewed, because its hash is what members hold; the server's
certificate lasts 90 days and is made anew 30 days before its end, or for other names. Keys are EC
P-256.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from molora_fed.errors import FederationError
from molora_fed.storage.files import hash_bytes, make_home, write_bytes

__all__ = ["ServerCertificate", "hash_certificate"]

AUTHORITY_DAYS = 3_650
SERVER_DAYS = 90
RENEW_DAYS = 30
_CLOCK_SKEW = datetime.timedelta(hours=1)


def hash_certificate(pem: str) -> str:
    """SHA-256 of a certificate's DER form, lower-case hex.

    Raises:
        FederationError: If it is no certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise FederationError(
            "Cannot use a certificate: expected one in PEM form, got unreadable text. "
            "Ask the coordinator for a new invitation."
        ) from error
    return hash_bytes(certificate.public_bytes(serialization.Encoding.DER))


class ServerCertificate:
    """The files of a coordinator's home that TLS needs.

    Args:
        root: The coordinator's home. Its authority's key lies with the coordinator's, what the
            server's process reads in a folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self._authority_key = root / "keys" / "authority.pem"
        self._folder = root / "tls"
        self._authority = self._folder / "authority.pem"
        self._chain = self._folder / "server.pem"
        self._key = self._folder / "server.key"

    @property
    def files(self) -> tuple[Path, ...]:
        """What a server's process reads."""
        return (self._folder,)

    @property
    def paths(self) -> tuple[str, str]:
        """Certificate chain and key of the server, for TLS."""
        return str(self._chain), str(self._key)

    @property
    def expires(self) -> datetime.datetime | None:
        """Until when the server's certificate is valid; None if there is no readable one."""
        try:
            return x509.load_pem_x509_certificate(self._chain.read_bytes()).not_valid_after_utc
        except (OSError, ValueError):
            return None

    @property
    def authority_file(self) -> Path:
        """The authority's certificate, PEM."""
        return self._authority

    @property
    def authority(self) -> str:
        """The authority's certificate, PEM text.

        Raises:
            FederationError: If there is none.
        """
        try:
            return self._authority.read_text(encoding="ascii")
        except OSError as error:
            raise FederationError(
                f"Cannot read '{self._authority}': expected the authority's certificate, got "
                f"{error.strerror}. Run `molora serve` once."
            ) from error

    def prepare_authority(self) -> str:
        """Make the authority, unless it is there.

        Returns:
            Hash of its certificate.

        Raises:
            FederationError: If its files cannot be read.
            StorageError: On I/O errors.
        """
        if not self._authority.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "molora-fed cooperative")])
            certificate = (
                _start(name, name, key.public_key(), days=AUTHORITY_DAYS)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(signs_certificates=True), critical=True)
                .add_extension(
                    x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
                )
                .sign(key, hashes.SHA256())
            )
            make_home(self._authority_key.parent)
            make_home(self._folder)
            write_bytes(self._authority_key, _key_pem(key), mode=0o600)
            write_bytes(self._authority, certificate.public_bytes(serialization.Encoding.PEM))
        return hash_certificate(self.authority)

    def prepare(self, names: Sequence[str]) -> None:
        """Make the server's certificate, unless the one that is there has the names and the time.

        Args:
            names: Host names and IP addresses it is valid for.

        Raises:
            FederationError: If the authority's files cannot be used.
            StorageError: On I/O errors.
        """
        self.prepare_authority()
        if self._is_good(names):
            return
        try:
            authority_key = serialization.load_pem_private_key(
                self._authority_key.read_bytes(), password=None
            )
            authority = x509.load_pem_x509_certificate(self.authority.encode())
        except (OSError, ValueError, TypeError) as error:
            raise FederationError(
                f"Cannot use '{self._authority_key}': expected the authority's key, got "
                f"{type(error).__name__}. Restore it from a backup; with a new authority every "
                "member needs a new invitation."
            ) from error
        assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "molora-fed server")])
        certificate = (
            _start(subject, authority.subject, key.public_key(), days=SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
                critical=False,
            )
            .sign(authority_key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        # The key first: a server that looks in between keeps the pair it has.
        write_bytes(self._key, _key_pem(key), mode=0o600)
        write_bytes(self._chain, pem + self.authority.encode())

    def _is_good(self, names: Sequence[str]) -> bool:
        """Whether the server's certificate is there, lasts, has these names, and is its key's."""
        try:
            certificate = x509.load_pem_x509_certificate(self._chain.read_bytes())
            key = serialization.load_pem_private_key(self._key.read_bytes(), password=None)
            issued = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (OSError, ValueError, TypeError, x509.ExtensionNotFound):
            return False
        now = datetime.datetime.now(datetime.UTC)
        return (
            # One that was made while this machine's clock was ahead is good for nobody yet.
            certificate.not_valid_before_utc <= now
            and certificate.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS)
            and set(issued.value) == {_general_name(name) for name in names}
            and key.public_key() == certificate.public_key()
        )


def _start(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
