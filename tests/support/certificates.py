"""Certificates for tests, made when they are needed."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, what it signed, and an authority that signed nothing."""

    ca: Path
    server: Path
    client: Path
    client_key: Path
    other_ca: Path

    def server_context(self, *, ask_for_client: bool = False) -> ssl.SSLContext:
        """What a server at localhost speaks TLS with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server)
        if ask_for_client:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def make_certificates(folder: Path) -> Certificates:
    """Write them all into the folder."""
    authority = _authority("Test CA")
    other = _authority("Other CA")
    server_key, server = _signed("localhost", authority)
    client_key, client = _signed("a client", authority)
    files = {
        "ca.pem": _pem(authority[1]),
        "other.pem": _pem(other[1]),
        "server.pem": _key_pem(server_key) + _pem(server),
        "client.pem": _pem(client),
        "client.key": _key_pem(client_key),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Certificates(
        ca=folder / "ca.pem",
        server=folder / "server.pem",
        client=folder / "client.pem",
        client_key=folder / "client.key",
        other_ca=folder / "other.pem",
    )


# Python 3.13 and later verify strictly by RFC 5280, which wants these extensions.
_AUTHORITY_USAGE = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)
_Pair = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def _authority(name: str) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_AUTHORITY_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, builder.sign(key, hashes.SHA256())


def _signed(name: str, authority: _Pair) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority[1].subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    names = [x509.DNSName("localhost")]
    signer = authority[0].public_key()
    builder = (
        _builder(name, str(issuer), key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )
    return key, builder.sign(authority[0], hashes.SHA256())


def _builder(name: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
