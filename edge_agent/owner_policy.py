"""What this node's owner allows: a file that the cloud cannot write, looked at before each task and each release.

```toml
sandbox = "landlock"        # the least that apps are kept in: none, landlock, bubblewrap, user
logs = false                # what apps print stays here
models = ["digits*"]        # releases of these may be served

signers = ["publisher-*"]    # roles of the installation's metadata that this node follows; none: all
hours = {start = "22:00", end = "06:00"}   # when apps may run, in this machine's time zone

[[apps]]                    # the first that fits an app holds; of an app that none fits nothing runs
name = "digits"
publisher = "publisher-al"  # the role that must vouch for it; * and ? stand for others
digests = ["9f2c..."]       # of its bundle; none: any
network = false
data = ["/srv/digits"]      # what it may read beside its own; "/": all but what is the agent's
```

Without a file everything is allowed, as far as the node can tell apps from itself.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, ValidationError

from fedtide.edge_agent.sandbox.levels import Level, is_enough, what_to_do
from fedtide.fabric.errors import ConfigError, RemoteError
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.plans.windows import Window, is_open
from fedtide.fabric.strict import Strict
from fedtide.fabric.validation import config_error

EVERYTHING = Path("/")
_OTHERS_WRITE = 0o022


class OwnerRefuses(RemoteError):
    """This node's owner does not allow it; the message says which rule."""


class AppRule(Strict):
    """What the apps that it fits may do."""

    name: str = Field(default="*", description="Of the app, as its pyproject.toml has it; * and ? stand for others")
    publisher: str = Field(default="*", description="The role that vouches for it; * and ? stand for others")
    digests: list[str] = Field(default=[], description="Of its bundle; none: any")
    cpus: float | None = Field(default=None, gt=0, description="Cores that it may use; needs a delegated cgroup")
    memory_bytes: int | None = Field(
        default=None, ge=1, description="Memory that it may use, or its task ends; as cpus"
    )
    processes: int = Field(default=512, ge=1, description="Processes that it may have at a time")
    gpu: bool = Field(default=True, description="Whether it sees this machine's GPUs")
    network: bool = Field(default=False, description="Whether it may reach anything beside this machine")
    data: list[Path] = Field(default=[], description="What it may read beside its own; /: all that is not the agent's")

    def check_enforceable(self, *, by_cgroup: bool) -> None:
        """Raises OwnerRefuses: the owner limits what this machine cannot limit."""
        asked = [name for name in ("cpus", "memory_bytes") if getattr(self, name) is not None]
        if asked and not by_cgroup:
            raise OwnerRefuses(
                f"the owner of this node limits {' and '.join(asked)} of {self.name!r}, and nothing here can hold it",
                "Delegate a cgroup (v2) to the agent (systemd: Delegate=yes), or use limits of the agent's settings",
            )

    def fits(self, app: AppRef, publishers: Collection[str]) -> bool:
        vouched = self.publisher == "*" or any(fnmatchcase(each, self.publisher) for each in publishers)
        return fnmatchcase(app.name, self.name) and vouched and (not self.digests or app.bundle.digest in self.digests)


class OwnerPolicy(Strict):
    """The file's content."""

    training: bool = Field(default=True, description="Whether anything trains here")
    logs: bool = Field(default=True, description="Whether the cloud may read what apps print here")
    sandbox: Level = Field(default="landlock", description="The least that apps are kept in")
    models: list[str] = Field(default=["*"], description="Of which releases may be served; * and ? stand for others")
    signers: list[str] = Field(
        default=["*"], description="Roles of the installation's metadata that count here; * and ? stand for others"
    )
    hours: Window | None = Field(default=None, description="When apps may run; a task waits for its beginning")
    apps: list[AppRule] = Field(default=[], description="The first that fits holds; none: nothing trains")

    def rule_for(self, app: AppRef, level: Level, publishers: Collection[str] = ()) -> AppRule:
        """What an app may do here.

        Args:
            level: what this node keeps apps in.
            publishers: the roles that vouch for it; none, where nothing is signed.

        Raises:
            OwnerRefuses: it may not run.
        """
        if not self.training:
            raise OwnerRefuses("the owner of this node allows no training (training = false)")
        if not is_enough(level, self.sandbox):
            raise OwnerRefuses(
                f"the owner of this node demands a sandbox (sandbox = {self.sandbox!r}), and it has {level!r}",
                what_to_do(self.sandbox),
            )
        self._check_signers(f"app {app.name!r}", publishers)
        counting = [each for each in publishers if self._counts(each)]
        for rule in self.apps:
            if rule.fits(app, counting):
                return rule
        raise OwnerRefuses(f"the owner of this node has no rule ([[apps]]) for {app.name!r}, {app.bundle.digest[:12]}")

    def check_release(self, model: str, signers: Collection[str]) -> None:
        """Raises OwnerRefuses: none of those who vouch for it counts here."""
        self.check_model(model)
        self._check_signers(f"a release of {model!r}", signers)

    def _check_signers(self, what: str, signers: Collection[str]) -> None:
        if self.signers != ["*"] and not any(map(self._counts, signers)):
            by = f"it is signed by {', '.join(sorted(signers))}" if signers else "nobody has signed it"
            raise OwnerRefuses(f"the owner of this node follows signers = {self.signers} only; {what}: {by}")

    def _counts(self, signer: str) -> bool:
        return any(fnmatchcase(signer, each) for each in self.signers)

    def check_model(self, model: str) -> None:
        """Raises OwnerRefuses: no release of it may be served here."""
        if not any(fnmatchcase(model, each) for each in self.models):
            raise OwnerRefuses(f"the owner of this node lets no model {model!r} be served (models = {self.models})")


OPEN = OwnerPolicy(sandbox="none", apps=[AppRule(network=True, data=[EVERYTHING])])
"""What holds where no file is configured."""


def read(file: Path) -> OwnerPolicy:
    """Raises ConfigError: it is not there, is not a policy, or others than root can write it."""
    try:
        about, text = file.stat(), file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(str(file), f"cannot be read: {exc}", "Nothing trains until it can") from exc
    if about.st_mode & _OTHERS_WRITE or about.st_uid not in (0, _overflow_uid()):
        raise ConfigError(str(file), "can be written by others than root", f"chown root {file}; chmod 644 {file}")
    return parse(text, str(file))


def parse(text: str, path: str) -> OwnerPolicy:
    """Raises ConfigError naming the field."""
    try:
        return OwnerPolicy.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(path, f"is not TOML: {exc}") from exc
    except ValidationError as exc:
        raise config_error(exc, OwnerPolicy, path) from exc


def _overflow_uid() -> int:
    """By which a user namespace shows the real root (user_namespaces(7)), unless this process could be it."""
    nobody = 65534
    return nobody if os.geteuid() != nobody else 0


class Owner:
    """The policy as it is now."""

    def why_not_now(self, zone: str) -> str:
        """Why no app may run at this time, or nothing. `zone`: of this machine."""
        try:
            hours = self.policy().hours
        except OwnerRefuses as exc:
            return exc.what
        if hours is None or is_open(hours, datetime.now(UTC), zone):
            return ""
        return f"outside the owner's hours {hours.start:%H:%M} to {hours.end:%H:%M}"

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def policy(self) -> OwnerPolicy:
        """Raises OwnerRefuses: the file cannot be read, so nothing is allowed."""
        if self._file is None:
            return OPEN
        try:
            return read(self._file)
        except ConfigError as exc:
            raise OwnerRefuses(f"this node's policy is no good: {exc}") from exc
