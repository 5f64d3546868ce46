"""An installation's own certificate authority, and the certificate of its servers (X.509, ECDSA P-256)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtide.fabric.errors import InvalidTransition

CA_DAYS = 3650
SERVER_DAYS = 825
RENEW_DAYS = 60
"""A certificate that expires sooner is renewed."""


def authority(name: str) -> tuple[str, str]:
    """A new authority: its certificate and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    made = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(made), _key_pem(key)


def server(ca_cert: str, ca_key: str, hosts: Iterable[str], *, connects: bool = False) -> tuple[str, str]:
    """A certificate for servers that answer as `hosts` (names or addresses), and its key, as PEM.

    Args:
        connects: those of the hub show it to each other too, and are believed: nobody else's may serve for that.
    """
    names = list(hosts)
    issuer = x509.load_pem_x509_certificate(ca_cert.encode())
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if connects else [])]
    made = _of_server(issuer, ca_key, key.public_key(), subject, [_host(n) for n in names], usages)
    return _pem(made), _key_pem(key)


def _of_server(
    issuer: x509.Certificate,
    ca_key: str,
    key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    hosts: Iterable[x509.GeneralName],
    usages: Iterable[x509.ObjectIdentifier],
) -> x509.Certificate:
    signer = serialization.load_pem_private_key(ca_key.encode(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    return (
        _builder(subject, issuer.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )


def renewed(ca_cert: str, ca_key: str, csr: str, present: str, text: bytes, shown: bytes) -> str:
    """A certificate for the key of a signing request, and for the hosts of the present one, as PEM.

    Args:
        present: a certificate of this authority that has not expired.
        shown: `text`, signed with the key of that one (ECDSA, SHA-256).

    Raises:
        InvalidTransition: it is not of this authority, has expired, or is not of whoever asks.
    """
    issuer = x509.load_pem_x509_certificate(ca_cert.encode())
    try:
        request, before = x509.load_pem_x509_csr(csr.encode()), x509.load_pem_x509_certificate(present.encode())
        key, held = request.public_key(), before.public_key()
        before.verify_directly_issued_by(issuer)
        usages = before.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        named = before.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(held, ec.EllipticCurvePublicKey):
            raise ValueError("another kind of key than EC")
        held.verify(shown, text, ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as exc:
        raise InvalidTransition(f"the present certificate is not renewed: {exc or type(exc).__name__}") from exc
    if ExtendedKeyUsageOID.CLIENT_AUTH in usages or not request.is_signature_valid:
        raise InvalidTransition("the present certificate is not renewed: it is not that of a leaf")
    if before.not_valid_after_utc < datetime.now(UTC):
        raise InvalidTransition("the present certificate has expired", "fedtide fleet region REGION --host HOST")
    return _pem(_of_server(issuer, ca_key, key, before.subject, list(named), usages))


def is_good(cert: str, hosts: Iterable[str]) -> bool:
    """Whether a certificate answers for all `hosts` and does not end soon."""
    read = x509.load_pem_x509_certificate(cert.encode())
    named = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    there = {str(n.value) for n in named}
    ends = read.not_valid_after_utc - datetime.now(UTC)
    return set(hosts) <= there and ends > timedelta(days=RENEW_DAYS)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks of nodes differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(cert: x509.Certificate) -> str:
    return cert.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
