"""The root's key in a PKCS #11 token (SoftHSM): it signs there, and never leaves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Targets

pytestmark = pytest.mark.slow  # it needs Debian's softhsm2 and the extra `pkcs11`

LIBRARY = "/usr/lib/softhsm/libsofthsm2.so"
KEY = "hsm:2?label=fedtide"
MAKE_KEY = """
import pkcs11
from pkcs11.util.ec import encode_named_curve_parameters
token = pkcs11.lib({library!r}).get_token(token_label="fedtide")
with token.open(rw=True, user_pin="1234") as session:
    curve = {{pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}}
    session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True).generate_keypair(id=bytes([2]), store=True)
"""


@pytest.fixture
def token(tmp_path: Path) -> dict[str, str]:
    """The environment in which there is a token with a key."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path}/tokens\n")
    environment = {
        **os.environ,
        "SOFTHSM2_CONF": str(tmp_path / "softhsm2.conf"),
        "PYKCS11LIB": LIBRARY,
        "FEDTIDE_HOME": str(tmp_path / "home"),
        "FEDTIDE_KEY_PASSPHRASE": "1234",
    }
    made = ["softhsm2-util", "--init-token", "--free", "--label", "fedtide", "--pin", "1234", "--so-pin", "4321"]
    subprocess.run(made, env=environment, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", MAKE_KEY.format(library=LIBRARY)], env=environment, check=True)
    return environment


def fedtide(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedtide.console.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_root_whose_key_is_on_a_token_delegates(token: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    begun = fedtide(token, "trust", "init", str(folder), "--root-key", KEY)
    assert begun.returncode == 0, begun.stderr
    assert not list(folder.glob("root*.pem"))
    more = ("--sign", KEY, "--folder", str(folder), "--no-publish")
    done = fedtide(token, "trust", "delegate", "publisher-vision", "--for", "vision-*", *more)
    assert done.returncode == 0, done.stderr
    root = Metadata[Root].from_bytes(json.loads((folder / "trust-roots.json").read_text())[0].encode())
    targets = Metadata[Targets].from_bytes((folder / "trust-targets.json").read_bytes())
    root.verify_delegate("root", root)
    root.verify_delegate("targets", targets)
    assert targets.signed.delegations is not None
    assert "publisher-vision" in (targets.signed.delegations.roles or {})
    (keyid,) = root.signed.roles["root"].keyids
    assert root.signed.keys[keyid].keytype == "ecdsa"
    targets.signed.version += 1
    with pytest.raises(UnsignedMetadataError):
        root.verify_delegate("targets", targets)


def test_a_wrong_pin_and_another_token_are_said(token: dict[str, str], tmp_path: Path) -> None:
    for environment, key in (
        ({**token, "FEDTIDE_KEY_PASSPHRASE": "0000"}, KEY),
        (token, "hsm:2?label=nobody"),
        (token, "hsm:7?label=fedtide"),
        ({**token, "PYKCS11LIB": "/nowhere.so"}, KEY),
    ):
        refused = fedtide(environment, "trust", "init", str(tmp_path / "keys"), "--root-key", key)
        assert refused.returncode == 2, refused.stderr
        assert "the token does not work" in refused.stderr
        assert not (tmp_path / "keys" / "trust-roots.json").exists()
