"""`python -m fedtide.edge_agent.policy_check FILE`: what an owner's policy allows, of all, of an app, of a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedtide.edge_agent import owner_policy
from fedtide.edge_agent.owner_policy import AppRule, OwnerPolicy, OwnerRefuses
from fedtide.edge_agent.sandbox.levels import Level, is_enough, level_of, what_to_do
from fedtide.edge_agent.sandbox.users import User, may_read, user_of
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef


def told(policy: OwnerPolicy, level: Level, user: User | None = None) -> str:
    """The policy in words, for a node that keeps apps in `level`, as `user` if they have one of their own."""
    lines = [f"this machine keeps apps in: {level} (the policy demands {policy.sandbox})"]
    if not is_enough(level, policy.sandbox):
        remedy = what_to_do(policy.sandbox)
        lines.append(f"so nothing trains here: {remedy[0].lower()}{remedy[1:]}")
    lines.append(f"training: {_yes(policy.training)}; what apps print may be read: {_yes(policy.logs)}")
    lines.append(f"models that may be served: {', '.join(policy.models) or 'none'}")
    lines.append(f"signers that count: {', '.join(policy.signers) or 'none'}")
    if (hours := policy.hours) is not None:
        lines.append(f"apps run from {hours.start:%H:%M} to {hours.end:%H:%M} on {', '.join(hours.days)}")
    lines += [f"app {number}: {_rule(rule)}" for number, rule in enumerate(policy.apps, 1)]
    if user is not None:
        granted = [path for rule in policy.apps for path in rule.data if path.exists()]
        unread = [path for path in granted if not may_read(path, user)]
        lines += [f"{path} cannot be read by {user.name}: change its group or its rights" for path in unread]
    return "\n".join([*lines, *([] if policy.apps else ["no [[apps]]: no app may train"])])


def _rule(rule: AppRule) -> str:
    of = f", digests {', '.join(d[:12] for d in rule.digests)}" if rule.digests else ""
    of += f", of {rule.publisher}" if rule.publisher != "*" else ""
    data = ", ".join(map(str, rule.data)) or "nothing beside its own"
    limits = [f"{rule.processes} processes", "GPUs" if rule.gpu else "no GPU"]
    by_cgroup = "if a cgroup is delegated, else it does not run"
    limits += [f"{rule.cpus:g} cores ({by_cgroup})"] if rule.cpus is not None else []
    limits += [f"{rule.memory_bytes / 1e6:.0f} MB ({by_cgroup})"] if rule.memory_bytes is not None else []
    return f"{rule.name}{of}: network {_yes(rule.network)}; reads {data}; {', '.join(limits)}"


def _yes(value: bool) -> str:  # a value to be shown
    return "yes" if value else "no"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--app", default="", help="What would hold for an app of this name")
    parser.add_argument("--digest", default="0" * 64, help="Of its bundle")
    parser.add_argument("--publisher", default="", help="The role that vouches for it")
    parser.add_argument("--model", default="", help="Whether a release of it may be served")
    parser.add_argument("--apps-user", default="", help="The agent's setting of this name")
    asked = parser.parse_args()
    try:
        level = level_of("auto", asked.apps_user or None)
        policy = owner_policy.read(asked.file)
        if asked.model:
            policy.check_model(asked.model)
        if asked.app:
            app = AppRef(name=asked.app, bundle=BlobRef(digest=asked.digest, size_bytes=1))
            print(_rule(policy.rule_for(app, level, [asked.publisher] if asked.publisher else [])))
        elif asked.model:
            print(f"{asked.model} may be served")
        else:
            print(told(policy, level, user_of(asked.apps_user) if asked.apps_user else None))
    except (ConfigError, OwnerRefuses) as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
