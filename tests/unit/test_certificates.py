"""Who gets a new certificate for the hosts of the one that it has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtide.coordinator.identity import certificates
from fedtide.fabric.errors import InvalidTransition

HOSTS = ["leaf.example.com", "10.0.0.7"]
TEXT = b"what is asked for"


class Held(NamedTuple):
    cert: str
    key: str

    def signed(self, text: bytes = TEXT) -> bytes:
        key = serialization.load_pem_private_key(self.key.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key.sign(text, ec.ECDSA(hashes.SHA256()))


def signing_request(key: ec.EllipticCurvePrivateKey, *names: str) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def hosts(cert: str) -> list[str]:
    named = x509.load_pem_x509_certificate(cert.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(each.value) for each in named.value]


def test_the_new_certificate_is_for_the_new_key_and_for_the_hosts_of_the_present_one() -> None:
    ca, key = certificates.authority("a"), ec.generate_private_key(ec.SECP256R1())
    held = Held(*certificates.server(*ca, HOSTS))
    made = certificates.renewed(*ca, signing_request(key, "hub.example.com"), held.cert, TEXT, held.signed())
    assert hosts(made) == HOSTS, "whatever the request names"
    read = x509.load_pem_x509_certificate(made.encode())
    assert read.public_key() == key.public_key()
    read.verify_directly_issued_by(x509.load_pem_x509_certificate(ca[0].encode()))


def test_nobody_gets_one_who_does_not_hold_the_present_one() -> None:
    ca, other = certificates.authority("a"), certificates.authority("a")
    held, foreign = Held(*certificates.server(*ca, HOSTS)), Held(*certificates.server(*other, HOSTS))
    hub = Held(*certificates.server(*ca, HOSTS, connects=True))
    csr = signing_request(ec.generate_private_key(ec.SECP256R1()))
    for present, shown, why in (
        (held.cert, foreign.signed(), "not renewed"),
        (held.cert, held.signed(b"another text"), "not renewed"),
        (foreign.cert, foreign.signed(), "not renewed"),
        (ca[0], Held(*ca).signed(), "not renewed"),
        (hub.cert, hub.signed(), "not that of a leaf"),
        ("", held.signed(), "not renewed"),
    ):
        with pytest.raises(InvalidTransition, match=why):
            certificates.renewed(*ca, csr, present, TEXT, shown)
