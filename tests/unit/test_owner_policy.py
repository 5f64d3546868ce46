"""What a node's owner may say, and what follows from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtide.edge_agent.owner_policy import OPEN, Owner, OwnerRefuses, parse
from fedtide.edge_agent.sandbox.visible import all_but
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef

POLICY = """
sandbox = "none"
models = ["digits*"]

[[apps]]
name = "digits"
digests = ["%s"]
data = ["/srv/digits"]

[[apps]]
name = "digit?"
network = true
""" % ("a" * 64)


def app(name: str, digest: str = "b") -> AppRef:
    return AppRef(name=name, bundle=BlobRef(digest=digest * 64, size_bytes=1))


def test_the_first_rule_that_fits_holds() -> None:
    policy = parse(POLICY, "p")
    assert policy.rule_for(app("digits", "a"), "none").data == [Path("/srv/digits")]
    assert policy.rule_for(app("digits", "b"), "none").network
    with pytest.raises(OwnerRefuses, match="no rule"):
        policy.rule_for(app("digits-2"), "none")
    policy.check_model("digits-v2")
    with pytest.raises(OwnerRefuses, match="lets no model 'faces' be served"):
        policy.check_model("faces")
    assert OPEN.rule_for(app("any"), "none").network


def test_a_policy_that_cannot_be_read_allows_nothing(tmp_path: Path) -> None:
    with pytest.raises(OwnerRefuses, match="cannot be read"):
        Owner(tmp_path / "none.toml").policy()
    with pytest.raises(ConfigError, match=r"p\.sandbox"):
        parse('sandbox = "strong"', "p")


def test_the_owner_is_told_what_a_policy_allows_here(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)

    def check(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedtide.console.cli", "node", "policy", "check", str(file), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = check()
    assert whole.returncode == 0, whole.stderr
    assert "models that may be served: digits*" in whole.stdout
    assert "app 1: digits, digests aaaaaaaaaaaa: network no; reads /srv/digits" in whole.stdout
    assert check("--app", "digitx").stdout == "digit?: network yes; reads nothing beside its own\n"
    refused = check("--model", "faces")
    assert (refused.returncode, refused.stdout) == (OwnerRefuses.exit_code, "")
    assert "models = ['digits*']" in refused.stderr


def test_all_is_seen_but_what_is_hidden(tmp_path: Path) -> None:
    for name in ("a/b/secret", "a/b/c", "a/d", "e"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b/secret")
    seen = {str(path.relative_to(tmp_path)) for path in all_but([tmp_path / "a/b/secret"], tmp_path)}
    assert seen == {"a/b/c", "a/d", "e"}
