"""Where the files of a run are on this node, and what beside them its app may see."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.owner_policy import EVERYTHING, AppRule
from fedtide.edge_agent.sandbox import bubblewrap, users, visible
from fedtide.edge_agent.sandbox.confine import Confinement
from fedtide.edge_agent.sandbox.levels import Level
from fedtide.edge_agent.sandbox.users import User, user_of
from fedtide.edge_agent.tasks.app_logs import app_log_file
from fedtide.fabric.errors import MalformedMessage
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.process.files import remove_tree
from fedtide.fabric.strict import ConfigValues

MOST_MESSAGE_BYTES = 256 * 2**20
_SQLITE = ("", "-wal", "-shm")
_SECRETS = tuple(map(Path, ("/etc/fedtide", "/run/secrets", "/var/run/secrets")))
"""Where charts and Kubernetes mount what is the agent's."""


@dataclass(frozen=True, slots=True)
class TaskPlaces:
    """`given`: what the app gets, and cannot change; `out`: its answer; `user`: as whom it writes that."""

    given: Path
    out: Path
    user: User | None = None

    def open(self) -> None:
        """Make both, empty. The folder that they are in is the agent's: an app can put nothing in their place."""
        for folder in (self.given, self.out):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:  # of an attempt before
                remove_tree(folder)
                folder.mkdir()
        if self.user is not None:
            os.chown(self.out, self.user.uid, self.user.gid)

    def close(self) -> None:
        for folder in (self.given, self.out):
            with suppress(OSError):
                remove_tree(folder)

    def give(self, name: str, file: Path) -> Path:
        """A file of the agent, under another name, without a copy."""
        target = self.given / name
        target.unlink(missing_ok=True)
        os.link(file, target)
        return target

    def take(self, name: str, folder: Path) -> Path:
        """Move a file of the answer to the agent. It is looked at there: here the app could still change what it is.

        Raises:
            MalformedMessage: it is not there, or no file of its own: a link would be read with the agent's rights.
        """
        try:
            taken = (self.out / name).rename(folder / name)
        except OSError as exc:
            raise MalformedMessage(f"the app's process left no {name}") from exc
        about = taken.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
            remove_tree(taken) if taken.is_dir() and not taken.is_symlink() else taken.unlink()
            raise MalformedMessage(f"the app left {name} as a link")
        return taken

    def take_message(self, folder: Path) -> bytes:
        """Its message, which is as large as one may be that is read at once.

        Raises:
            MalformedMessage: it is not there, no file of its own, or too large.
        """
        message = self.take("message.json", folder)
        if (size := message.stat().st_size) > MOST_MESSAGE_BYTES:
            raise MalformedMessage(f"the app's answer has {size / 1e6:.0f} MB beside its arrays")
        return message.read_bytes()


class AppPlaces:
    """All below the agent's data folder."""

    def __init__(self, config: AgentConfig, level: Level) -> None:
        self._config = config
        self._user = user_of(config.apps_user) if level == "user" and config.apps_user is not None else None
        self._root = config.data_dir.resolve()
        self._environments = (config.packages.folder or self._root / "environments").resolve()
        self.jobs, self.apps, self.work = (self._root / name for name in ("jobs", "apps", "work"))
        self.homes, self.trainer = self._root / "homes", self._root / "trainer"
        self._logs = app_log_file(self._root, "x").parent
        self._confined: tuple[object, str] | None = None
        """What was asked last, and the answer: of one run after the other."""

    def of_task(self, run: str, task: str) -> TaskPlaces:
        return TaskPlaces(self.jobs / run / "in" / task, self.jobs / run / "out" / task, self._user)

    def progress(self, run: str, task: str) -> Path:
        """The checkpoint of a task that takes long."""
        return self.jobs / run / "progress" / task

    def let_read(self) -> None:
        """Let apps read what they are given, where they are another user and the agent was careful before that."""
        for folder in (self.homes, self.work, self.jobs, *self.jobs.glob("*"), *self.jobs.glob("*/*")):
            if folder.name != "progress" and folder.is_dir():
                folder.chmod(0o755)  # an app's own are below
        given = [self._root / name for name in ("downloads", "runs", "samples")]
        users.let_read([self.apps, self._environments, *given])

    @property
    def hidden(self) -> list[Path]:
        """What no app sees: the agent's files, its secrets, and what its configuration names beside them."""
        config = self._config
        files = (config.credentials, config.join_token_file, config.http_token_file, config.policy_file)
        named = [self._root, *config.hidden, *(file for file in files if file is not None)]
        return [path.resolve() for path in (*named, *_SECRETS)]

    def confinement(self, run: str, app: AppRef, rule: AppRule, node_config: ConfigValues) -> str:
        """What the process of a run may see and do: a `Confinement` as JSON.

        Args:
            app: the runs of apps of its name share a home, for what they download.
            node_config: as the app gets it. What it names is for the app to read.
        """
        own = [self.work / run, self.jobs / run / "progress"]
        home, out = self.homes / _folder_of(app.name), self.jobs / run / "out"
        for folder in (*own, home, out, self.jobs / run / "in"):
            folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            for folder in (*own, home):
                users.hand_over(folder, *((self._user.uid, self._user.gid) if self._user is not None else (0, 0)))
        if self._user is not None:
            (self.apps / app.bundle.digest).chmod(0o755)  # it was unpacked for the agent alone
        os.utime(home)
        asked = run, app.bundle.digest, rule, node_config
        if self._confined is not None and self._confined[0] == asked:
            return self._confined[1]  # looking at all folders takes as long as a small task
        data = visible.all_but(self.hidden) if EVERYTHING in rule.data else rule.data
        code = self.apps / app.bundle.digest
        read = [*visible.system(), *visible.package(), *data, *named_in(node_config)]
        read += [self.jobs / run / "in", code, self._environments]
        found = Confinement(
            read=read, write=[*own, out], home=home, network=rule.network, gpu=rule.gpu, user=self._user
        )
        self._confined = asked, found.model_dump_json()
        return self._confined[1]

    def bubblewrapped(self, *, network: bool, named: Iterable[Path], data: Iterable[Path]) -> list[str]:
        """What stands before the command line of the trainer process, which serves all apps.

        Args:
            named: what nodes' configuration lets apps read.
            data: what the owner's policy lets them read, where they run as a user of their own.
        """
        return bubblewrap.command(
            self.hidden,
            [*self._readable, *named],
            self._writable,
            network=network,
            cwd=self.trainer,
            user=self._user,
            data=[path for path in data if path != EVERYTHING],
        )

    def shown(self) -> tuple[int, ...]:
        """Which folders that command shows (by inode): of one that was made anew a running process sees the old one."""
        folders = (*self._writable, *self._readable)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return tuple(folder.stat().st_ino for folder in folders)

    @property
    def _writable(self) -> list[Path]:
        return [self.jobs, self.work, self.homes, self.trainer, self._logs]

    @property
    def _readable(self) -> list[Path]:
        return [self.apps, self._environments]


def _folder_of(app: str) -> str:
    """An app may have any name: none is a path."""
    return hashlib.sha256(app.encode()).hexdigest()[:32]


def named_in(node_config: ConfigValues) -> list[Path]:
    """Files and folders of this machine that a node's configuration names: whoever wrote it wants them read."""
    absolute = [value for value in node_config.values() if isinstance(value, str) and value.startswith("/")]
    found = [Path(f"{value}{suffix}") for value in absolute for suffix in _SQLITE]
    return [path for path in found if path.exists() and path != EVERYTHING]
