"""`python -m fedtide.edge_agent.identity.region_renewal`: a region's servers get new credentials.

It asks the coordinator over the region's own server, with credentials that are for nothing else, and writes the answer
into the region's Secret. Seeds and the leaf's private key are made here and stay in that Secret: they are there before
it asks, so a Job that was ended in between asks again for the same. What a region had before stays good until the next
time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from fedtide.fabric.cluster.connection import api_client
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import ConfigError, FedtideError, TransientError
from fedtide.fabric.events.identity import RegionRenewalAnswer, RegionRenewalRequest, proof_of_region
from fedtide.fabric.nats import jwt as nats_jwt
from fedtide.fabric.nats.authority import REGION_FILES, RENEWAL
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access, Credentials
from fedtide.fabric.nats.jwt import Key
from fedtide.fabric.nats.subjects import REGIONS_OWN, Subjects

Files = Mapping[str, str]
CA, CERT, KEY = "ca.crt", "tls.crt", "tls.key"
PENDING = "renewal.json"
"""In the Secret while it asks: seeds by file, and the leaf's next private key."""
NOT_AGAIN_S = 86_400.0
CONNECT_S, ANSWER_S = 30.0, 20.0


def is_due(files: Files, now: float) -> bool:
    """Whether the present credentials are a day old."""
    return now - float(nats_jwt.read(Credentials.parse(files[RENEWAL]).jwt)["iat"]) > NOT_AGAIN_S


def prepared(files: Files) -> Files:
    """The files, with the secrets of what will be asked for."""
    if PENDING in files:
        return files
    made = {name: Key.new(nats_jwt.USER).seed for name in REGION_FILES}
    with_certificate = CERT in files and _is_ec(files.get(KEY, ""))  # ours are
    return {**files, PENDING: json.dumps({**made, **({KEY: _new_key()} if with_certificate else {})})}


def question(region: str, files: Files) -> RegionRenewalRequest:
    """What to ask, given prepared files."""
    seeds, present = json.loads(files[PENDING]), Credentials.parse(files[RENEWAL]).key
    keys = {name: Key.of(seeds[name]).public for name in REGION_FILES}
    csr = _signing_request(seeds[KEY]) if KEY in seeds else ""
    text = proof_of_region(region, keys, csr)
    asked = RegionRenewalRequest(
        keys=keys, renews=present.public, present=base64.b64encode(present.sign(text)).decode(), csr=csr
    )
    if not csr:
        return asked
    shown = _key(files[KEY]).sign(text, ec.ECDSA(hashes.SHA256()))
    return asked.model_copy(update={"certificate": files[CERT], "shown": base64.b64encode(shown).decode()})


def adopted(files: Files, answer: RegionRenewalAnswer) -> Files:
    """The files with what was answered, ready for servers.

    Raises:
        ConfigError: the coordinator gives nothing; it says why.
    """
    if answer.error:
        raise ConfigError("renewal", answer.error, answer.remedy)
    seeds = json.loads(files[PENDING])
    new = {name: Credentials(answer.jwts[name], Key.of(seeds[name])).text for name in REGION_FILES}
    key = {KEY: seeds[KEY]} if CERT in answer.files else {}
    return {name: text for name, text in {**files, **new, **answer.files, **key}.items() if name != PENDING}


async def ask(url: str, tenant: str, region: str, files: Files) -> RegionRenewalAnswer:
    """Raises TransientError: region or hub do not answer; CredentialsRefused: the present credentials are void."""
    with tempfile.TemporaryDirectory() as folder:
        ca, shown = Path(folder) / CA, Path(folder) / RENEWAL
        ca.write_text(files[CA], encoding="utf-8")
        Credentials.parse(files[RENEWAL]).save(shown)
        broker = await Broker.connect(url, f"renewal-{region}", Access(shown, ca), wait_s=CONNECT_S)
        try:
            raw = await broker.ask(
                Subjects(tenant).renewal(region, REGIONS_OWN), to_json(question(region, files)), timeout_s=ANSWER_S
            )
        finally:
            await broker.close()
    return from_json(RegionRenewalAnswer, raw, "answer")


def renew(api: Any, namespace: str, secret: str, url: str, tenant: str, region: str) -> str:
    """Renew what is in the Secret; returns what became of it.

    Raises:
        ConfigError: the Secret is not that of a region, or the coordinator refuses.
        TransientError: somebody does not answer.
        ApiException: the API server refuses.
    """
    found = api.read_namespaced_secret(secret, namespace).data or {}
    files = {name: base64.b64decode(text).decode() for name, text in found.items()}
    if missing := {*REGION_FILES, CA} - set(files):
        raise ConfigError(secret, f"has no {', '.join(sorted(missing))}", f"fedtide fleet region {region}")
    if PENDING not in files and not is_due(files, time.time()):
        return "nothing to do: the credentials are of today"
    ready = prepared(files)
    _patch(api, namespace, secret, {PENDING: ready[PENDING]})
    try:
        answer = asyncio.run(ask(url, tenant, region, ready))
        new = adopted(ready, answer)
    except ConfigError:
        _patch(api, namespace, secret, {PENDING: None})  # the next try has other keys
        raise
    _patch(api, namespace, secret, {**new, PENDING: None})
    return f"renewed, but not the certificate: {answer.note}" if answer.note else "renewed"


def _patch(api: Any, namespace: str, secret: str, files: Mapping[str, str | None]) -> None:
    data = {name: None if text is None else base64.b64encode(text.encode()).decode() for name, text in files.items()}
    api.patch_namespaced_secret(secret, namespace, {"data": data})


def _new_key() -> str:
    form = serialization.PrivateFormat.PKCS8
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def _key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _is_ec(pem: str) -> bool:
    try:
        return isinstance(serialization.load_pem_private_key(pem.encode(), None), ec.EllipticCurvePrivateKey)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def _signing_request(pem: str) -> str:
    """Without names: it is the present certificate that says them."""
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(_key(pem), hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", "--namespace", required=True)
    parser.add_argument("--secret", required=True, help="That of `fedtide fleet region REGION --secret`")
    parser.add_argument("--url", required=True, help="Of the region's server")
    parser.add_argument("--tenant", default="default")
    parser.add_argument("--region", required=True)
    asked = parser.parse_args()
    try:
        api = client.CoreV1Api(api_client())
        done = renew(api, asked.namespace, asked.secret, asked.url, asked.tenant, asked.region)
    except FedtideError as exc:
        print(f"fedtide region renewal: {exc}", file=sys.stderr)
        return exc.exit_code
    except ApiException as exc:
        remedy = f"The Job's service account needs to get and patch the Secret {asked.secret}"
        print(f"fedtide region renewal: the API server says {exc.status} {exc.reason}. {remedy}", file=sys.stderr)
        return TransientError.exit_code
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
