"""What a node's owner may say, and what follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtide.edge_agent.owner_policy import OPEN, AppRule, Owner, OwnerRefuses, parse
from fedtide.edge_agent.sandbox.cgroups import Cgroup
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
    assert check("--app", "digitx").stdout == "digit?: network yes; reads nothing beside its own; 512 processes, GPUs\n"
    refused = check("--model", "faces")
    assert (refused.returncode, refused.stdout) == (OwnerRefuses.exit_code, "")
    assert "models = ['digits*']" in refused.stderr


def test_all_is_seen_but_what_is_hidden(tmp_path: Path) -> None:
    for name in ("a/b/secret", "a/b/c", "a/d", "e"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b/secret")
    seen = {str(path.relative_to(tmp_path)) for path in all_but([tmp_path / "a/b/secret"], tmp_path)}
    assert seen == {"a/b/c", "a/d", "e"}


def test_an_owner_follows_the_publishers_that_the_policy_names() -> None:
    policy = parse(
        """
sandbox = "none"
signers = ["publisher-al", "releases"]
[[apps]]
name = "digits"
publisher = "publisher-a*"
processes = 7
[[apps]]
name = "faces"
""",
        "p",
    )
    assert policy.rule_for(app("digits"), "none", ["publisher-al"]).processes == 7
    assert policy.rule_for(app("faces"), "none", ["publisher-al"]).publisher == "*"
    with pytest.raises(OwnerRefuses, match=r"signers = .* it is signed by publisher-bo"):
        policy.rule_for(app("digits"), "none", ["publisher-bo"])
    with pytest.raises(OwnerRefuses, match="nobody has signed it"):
        policy.rule_for(app("digits"), "none")
    both = parse('sandbox = "none"\n[[apps]]\npublisher = "publisher-al"', "p")
    with pytest.raises(OwnerRefuses, match="no rule"):
        both.rule_for(app("digits"), "none", ["publisher-bo"])
    policy.check_release("digits", ["releases"])
    with pytest.raises(OwnerRefuses, match="a release of 'digits'"):
        policy.check_release("digits", ["releases-others"])
    OPEN.check_release("digits", [])


def test_apps_run_in_the_hours_that_the_owner_allows(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('hours = {start = "00:00", end = "00:00"}')  # all day
    assert Owner(file).why_not_now("UTC") == ""
    soon = datetime.now(UTC) + timedelta(hours=2)
    file.write_text(f'hours = {{start = "{soon:%H:%M}", end = "{soon + timedelta(hours=1):%H:%M}", timezone = "UTC"}}')
    assert "outside the owner's hours" in Owner(file).why_not_now("UTC")
    file.write_text("hours = 1")
    assert "no good" in Owner(file).why_not_now("UTC")
    assert Owner(None).why_not_now("UTC") == ""


def test_a_group_that_is_delegated_is_divided_and_one_that_is_not_is_left_alone(tmp_path: Path) -> None:
    """Files as the kernel has them; `tests/kernel` has a kernel that delegates one."""
    here = tmp_path / "system.slice" / "fedtide.service"
    here.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/system.slice/fedtide.service\n")
    assert Cgroup.delegated(tmp_path, tmp_path / "own") is None
    for name, text in (("controllers", "cpu memory pids io"), ("subtree_control", ""), ("procs", "1\n")):
        (here / f"cgroup.{name}").write_text(text)
    group = Cgroup.delegated(tmp_path, tmp_path / "own")
    assert group is not None
    assert (here / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert (here / "agent" / "cgroup.procs").read_text() == "1"
    group.limit(cpus=1.5, memory_bytes=None, processes=40)
    told = {file.name: file.read_text() for file in (here / "apps").iterdir()}
    assert told == {"cpu.max": "150000 100000", "memory.max": "max", "memory.oom.group": "1", "pids.max": "40"}
    group.enter()
    assert (here / "apps" / "cgroup.procs").read_text() == str(os.getpid())
    (tmp_path / "own").write_text("0::/system.slice/fedtide.service/agent\n")  # it was started again
    assert Cgroup.delegated(tmp_path, tmp_path / "own") is not None


def test_what_this_machine_cannot_limit_does_not_run_unlimited() -> None:
    AppRule(processes=10).check_enforceable(by_cgroup=False)
    AppRule(cpus=2, memory_bytes=10**9).check_enforceable(by_cgroup=True)
    with pytest.raises(OwnerRefuses, match="cpus and memory_bytes of 'digits'"):
        AppRule(name="digits", cpus=2, memory_bytes=10**9).check_enforceable(by_cgroup=False)
