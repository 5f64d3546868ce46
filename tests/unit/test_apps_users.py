"""Apps as a user of their own: who that may be, and how it gets to what it may read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fedtide.edge_agent.sandbox import bubblewrap
from fedtide.edge_agent.sandbox.levels import level_of, offered
from fedtide.edge_agent.sandbox.users import User, closed_to, hand_over, let_read, may_read, user_of
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.process.files import remove_tree

APPS = User(name="apps", uid=61234, gid=61234)


@pytest.mark.parametrize(
    ("told", "why"), [("nobody-here", "useradd"), ("root", "not a user"), ("0", "not a user"), ("٣", "no user")]
)
def test_a_user_that_apps_may_not_be_is_refused_with_what_to_do(told: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        user_of(told)


@pytest.mark.parametrize("told", ["4294967295", "4294967294", "99999999999999999999"])
def test_a_number_that_no_user_can_have_is_refused(told: str) -> None:
    with pytest.raises(ConfigError, match="not a user"):
        user_of(told)


def test_a_user_is_found_by_name_and_number() -> None:
    assert user_of("nobody") == user_of(str(user_of("nobody").uid))
    assert user_of("61234") == User(name="61234", uid=61234, gid=61234)


def test_without_a_user_nothing_changes_and_with_one_there_is_a_sandbox() -> None:
    assert level_of("off", None) == "none"
    assert level_of("auto", None) == offered()
    with pytest.raises(ConfigError, match="needs a sandbox"):
        level_of("off", "61234")


def test_only_root_can_let_apps_be_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="runs as root"):
        level_of("auto", "61234")


def test_the_topmost_closed_folder_on_each_way_is_found(tmp_path: Path) -> None:
    base = Path(tempfile.mkdtemp(prefix="fedtide-ways-"))  # pytest's own folders are closed
    try:
        for way in ("open/closed/closed", "open/open"):
            (base / way).mkdir(parents=True)
        for path in (base, base / "open", base / "open" / "open"):
            path.chmod(0o755)
        for path in (base / "open" / "closed", base / "open" / "closed" / "closed"):
            path.chmod(0o750)
        asked = [base / "open" / "closed" / "closed" / "file", base / "open" / "open" / "file", base / "none" / "file"]
        assert closed_to(APPS, asked) == {base / "open" / "closed"}
        assert closed_to(APPS.model_copy(update={"gid": base.stat().st_gid}), asked) == set()
    finally:
        remove_tree(base)


def test_what_it_must_reach_below_a_closed_folder_is_shown_and_the_way_can_be_passed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "a" / "data").mkdir(parents=True)
    closed.chmod(0o700)
    top = next(iter(closed_to(APPS, [closed / "a" / "data"])))
    words = bubblewrap.command((), (), (), network=False, cwd=tmp_path, user=APPS, data=[closed / "a" / "data"])
    order = [words.index(str(path)) for path in (top, closed / "a", closed / "a" / "data")]
    assert order == sorted(order)
    assert words[order[0] - 1] == "--tmpfs"
    assert words[order[1] - 1] == "--dir"
    assert words[order[2] - 1] == "--ro-bind-try"
    assert "--unshare-user-try" not in words


def test_whether_it_may_read_is_told_by_the_files_rights(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for mode, readable in ((0o644, True), (0o640, False), (0o600, False)):
        (tmp_path / "file").chmod(mode)
        assert may_read(tmp_path / "file", APPS) is readable
    tmp_path.chmod(0o754)
    assert not may_read(tmp_path, APPS), "a folder must let it pass, too"


def test_what_a_careful_agent_has_kept_can_be_read_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "apps" / "deep").mkdir(parents=True)
    for name in ("code", "program", "elsewhere"):
        (tmp_path / "apps" / "deep" / name).touch()
    (tmp_path / "apps" / "deep" / "program").chmod(0o700)
    (tmp_path / "apps" / "deep" / "code").chmod(0o600)
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "apps" / "link").symlink_to(tmp_path / "secret")
    for folder in (tmp_path / "apps" / "deep", tmp_path / "apps"):
        folder.chmod(0o700)
    let_read([tmp_path / "apps", tmp_path / "none"])
    deep = tmp_path / "apps" / "deep"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (deep.parent, deep, deep / "code", deep / "program")}
    assert modes == {"apps": 0o755, "deep": 0o755, "code": 0o644, "program": 0o755}
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_is_handed_over_with_all_in_it_but_for_what_is_also_elsewhere(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "deep").mkdir(parents=True)
    (own / "deep" / "file").touch()
    (tmp_path / "secret").touch()
    os.link(tmp_path / "secret", own / "hard")
    (own / "soft").symlink_to(tmp_path / "secret")
    hand_over(own, APPS.uid, APPS.gid)
    assert {path.stat().st_uid for path in (own, own / "deep", own / "deep" / "file")} == {APPS.uid}
    assert (tmp_path / "secret").stat().st_uid == 0
