"""What an app needs beside its machine's packages, and environments that have it: real uv, an index in a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedtide.fabric.errors import CapabilityMissing, ConfigError
from fedtide.fabric.packages import keeping
from fedtide.fabric.packages.environment import INSIDE, environment_for
from fedtide.fabric.packages.requirements import (
    WITH_FLOWER,
    all_installed,
    beside_flower,
    lacking,
    name_of,
    not_installed,
    unmet,
    worth_naming,
)
from fedtide.fabric.packages.rules import PackageRules, Wanted
from fedtide.fabric.packages.wheels import fitting
from tests.wheels import index, wheel


def _no_wheels() -> Path:
    raise AssertionError("nobody needs wheels here")


@pytest.fixture
def there(tmp_path: Path) -> str:
    versions = [("tidetable", "1.0"), ("tidetable", "2.0"), ("seaside", "3.1")]
    made = [wheel(tmp_path / "wheels", name, version) for name, version in versions]
    made.append(wheel(tmp_path / "wheels", "harbour", "1.0", requires=("tidetable<2", "numpy")))
    made.append(wheel(tmp_path / "wheels", "oldtimer", "1.0", requires=("pydantic<2",)))
    return index(tmp_path / "index", made)


def python_for(wanted: Wanted, fetch: Callable[[], Path]) -> Path | None:
    """The interpreter, held by nobody."""
    found = environment_for(wanted, fetch)
    if found is None:
        return None
    os.close(found.handle)
    return found.python


def _wanted(tmp_path: Path, *dependencies: str, rules: PackageRules, wheels: dict[str, str] | None = None) -> Wanted:
    app = tmp_path / "app"
    app.mkdir(exist_ok=True)
    return Wanted(
        root=tmp_path / "environments", rules=rules, app_dir=app, dependencies=dependencies, wheels=wheels or {}
    )


def _said_in(python: Path | None, code: str) -> str:
    assert python is not None
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_what_is_there_needs_no_environment(tmp_path: Path) -> None:
    wanted = _wanted(
        tmp_path, "flwr[simulation]>=99", "numpy>=1", "pywin32; sys_platform == 'win32'", rules=PackageRules()
    )
    assert python_for(wanted, _no_wheels) is None
    assert not (tmp_path / "environments").exists()


def test_an_environment_has_what_is_missing_over_what_the_machine_has(tmp_path: Path, there: str) -> None:
    python = python_for(_wanted(tmp_path, "harbour", "numpy", rules=PackageRules(index=there)), _no_wheels)
    code = "import harbour, tidetable, numpy, flwr, fedtide; print(tidetable.VERSION, numpy.__file__, flwr.__file__)"
    version, numpy_there, flwr_there = _said_in(python, code).split()
    import flwr
    import numpy

    assert (version, numpy_there, flwr_there) == ("1.0", numpy.__file__, flwr.__file__)
    assert python_for(_wanted(tmp_path, "harbour", "numpy", rules=PackageRules(index=there)), _no_wheels) == python
    assert not unmet(["numpy"]) and unmet(["harbour"]) == ["harbour"]  # nothing of it is seen here
    assert (tmp_path / "environments" / keeping.CACHE).is_dir()  # it counts, and goes, with them


def test_apps_with_other_versions_do_not_meet(tmp_path: Path, there: str) -> None:
    rules = PackageRules(index=there)
    pythons = [python_for(_wanted(tmp_path, each, rules=rules), _no_wheels) for each in ("tidetable<2", "tidetable>=2")]
    assert [_said_in(p, "import tidetable; print(tidetable.VERSION)") for p in pythons] == ["1.0", "2.0"]


def test_a_version_beside_that_of_the_machine_leaves_the_machines_as_it_is(tmp_path: Path) -> None:
    wheels = [wheel(tmp_path / "wheels", "iniconfig", "99.0")]
    rules = PackageRules(index=index(tmp_path / "index", wheels))
    before = version("iniconfig")
    python = python_for(_wanted(tmp_path, "iniconfig==99", rules=rules), _no_wheels)
    assert _said_in(python, "import iniconfig; print(iniconfig.VERSION)") == "99.0"
    assert version("iniconfig") == before != "99.0"


@pytest.mark.parametrize(
    ("rules", "wheels", "says"),
    [
        (PackageRules(), {}, "no index may be asked here.*--with-wheels.*packages.index"),
        (PackageRules(wheels=False), {"tidetable-1.0-py3-none-any.whl": "a" * 64}, "nothing may be installed here"),
    ],
)
def test_an_owner_who_forbids_it_is_named(
    tmp_path: Path, rules: PackageRules, wheels: dict[str, str], says: str
) -> None:
    with pytest.raises(CapabilityMissing, match=f"(?s)needs tidetable.*{says}"):
        python_for(_wanted(tmp_path, "tidetable", rules=rules, wheels=wheels), _no_wheels)


def test_what_cannot_be_installed_is_said_and_leaves_nothing(tmp_path: Path, there: str) -> None:
    for needs, says in (("no-such-thing", "no-such-thing"), ("oldtimer", "pydantic")):
        with pytest.raises(CapabilityMissing, match=says) as told:
            python_for(_wanted(tmp_path, needs, rules=PackageRules(index=there)), _no_wheels)
        assert there not in str(told.value)  # an index's URL may hold a password
    with pytest.raises(ConfigError, match="no requirement"):
        python_for(_wanted(tmp_path, "a b c", rules=PackageRules(index=there)), _no_wheels)
    assert [f.name for f in (tmp_path / "environments").iterdir() if not f.name.startswith(".")] == []


def test_wheels_are_fetched_only_for_an_environment_that_is_not_there(tmp_path: Path, there: str) -> None:
    fetched = []

    def fetch() -> Path:
        fetched.append(1)
        return tmp_path / "wheels"

    wanted = _wanted(tmp_path, "tidetable<2", rules=PackageRules(), wheels={"tidetable-1.0-py3-none-any.whl": "a" * 64})
    python = python_for(wanted, fetch)
    assert _said_in(python, "import tidetable; print(tidetable.VERSION)") == "1.0"
    assert python_for(wanted, fetch) == python and len(fetched) == 1


def test_a_lock_file_goes_before_the_dependencies(tmp_path: Path, there: str) -> None:
    wanted = _wanted(tmp_path, "tidetable", rules=PackageRules(index=there))
    (wanted.app_dir / "pyproject.toml").write_text(
        '[project]\nname = "app"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["tidetable<2"]\n'
    )
    environment = {**os.environ, "UV_DEFAULT_INDEX": there, "UV_NO_CONFIG": "1"}
    command = [sys.executable, "-m", "uv", "lock", "--project", str(wanted.app_dir)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    python = python_for(wanted, _no_wheels)
    assert _said_in(python, "import tidetable; print(tidetable.VERSION)") == "1.0"
    (wanted.app_dir / "uv.lock").write_text("not = [a lock")
    with pytest.raises(ConfigError, match=r"uv\.lock.*uv lock"):
        python_for(wanted, _no_wheels)


def test_environments_that_were_not_used_make_room_but_those_in_use_stay(tmp_path: Path, there: str) -> None:
    rules = PackageRules(index=there)
    old, held, new = (
        python_for(_wanted(tmp_path, each, rules=rules), _no_wheels)
        for each in ("tidetable<2", "tidetable>=2", "seaside")
    )
    assert old is not None and held is not None and new is not None
    for age, python in ((300, held), (200, old), (100, new)):
        os.utime(python.parent.parent, (1e9 - age, 1e9 - age))
    handle = keeping.hold(held)
    root = tmp_path / "environments"
    keeping.make_room(root, PackageRules(max_bytes=keeping.size_of([new.parent.parent]) + 4096))
    assert [p.exists() for p in (old, held, new)] == [False, True, False]
    os.close(handle)
    keeping.make_room(root, PackageRules(max_bytes=1))
    assert not held.exists() and not (root / keeping.CACHE).exists()


def test_one_that_is_larger_than_all_may_be_is_refused(tmp_path: Path, there: str) -> None:
    with pytest.raises(CapabilityMissing, match=r"the owner allows .* packages\.max_bytes"):
        python_for(_wanted(tmp_path, "tidetable", rules=PackageRules(index=there, max_bytes=1000)), _no_wheels)


def test_one_that_was_broken_off_is_made_anew(tmp_path: Path, there: str) -> None:
    wanted = _wanted(tmp_path, "tidetable", rules=PackageRules(index=there))
    python = python_for(wanted, _no_wheels)
    assert python is not None
    (python.parent.parent / ".complete").unlink()
    shutil.rmtree(python.parent)
    assert python_for(wanted, _no_wheels) == python and python.exists()


def test_an_app_cannot_bring_what_it_is_spoken_to_with(tmp_path: Path) -> None:
    made = [
        wheel(tmp_path / "wheels", "fedtide", "99.0"),
        wheel(tmp_path / "wheels", "trojan", "1.0", requires=("fedtide>=99",)),
    ]
    rules = PackageRules(index=index(tmp_path / "index", made))
    assert python_for(_wanted(tmp_path, "fedtide>=99", rules=rules), _no_wheels) is None
    with pytest.raises(CapabilityMissing, match="fedtide"):
        python_for(_wanted(tmp_path, "trojan", rules=rules), _no_wheels)


def test_a_url_is_asked_only_where_an_index_may_be(tmp_path: Path) -> None:
    made = wheel(tmp_path / "wheels", "tidetable", "1.0")
    asked = f"tidetable @ {made.resolve().as_uri()}"
    travelling = {made.name: "a" * 64}
    with pytest.raises(CapabilityMissing, match="no other machine may be asked"):
        python_for(
            _wanted(tmp_path, asked, rules=PackageRules(), wheels={"other-1-py3-none-any.whl": "b" * 64}),
            lambda: tmp_path,
        )
    for rules, wheels in ((PackageRules(), travelling), (PackageRules(index="default"), {})):
        python = python_for(_wanted(tmp_path, asked, rules=rules, wheels=wheels), lambda: tmp_path / "wheels")
        assert _said_in(python, "import tidetable; print(tidetable.VERSION)") == "1.0"
    with pytest.raises(ConfigError, match="no requirement"):
        python_for(
            _wanted(tmp_path, "x @ https://a.example/x.whl\n--index-url=y", rules=PackageRules()), lambda: tmp_path
        )


def test_an_environment_that_lacks_what_it_was_made_for_is_not_made_again(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INSIDE, "1")
    with pytest.raises(CapabilityMissing, match="was made for the app lacks tidetable"):
        python_for(_wanted(tmp_path, "tidetable", rules=PackageRules(index=there)), _no_wheels)


@pytest.mark.parametrize("told", ["", "Name: half\n", "Version: 1\n"])
def test_what_an_interrupted_installer_left_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    left = tmp_path / "half-1.0.dist-info"
    left.mkdir()
    if told:
        (left / "METADATA").write_text(f"Metadata-Version: 2.1\n{told}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "half" not in all_installed() and "pytest" in beside_flower()


def test_of_another_machine_only_what_is_sure_is_said() -> None:
    there = {"scipy": "evil", "xgboost": "2.1"}
    assert lacking(["scipy>=1", "xgboost>=2", "catboost"], there) == ["scipy>=1", "catboost"]
    odd = ["pyarm==1; platform_machine == 'x86_64'", "!!", "zz; sys_platform ~= 'linux'"]
    assert lacking(odd, there) == []
    assert worth_naming(odd[:1]) == []
    for text in odd[1:]:
        with pytest.raises(ConfigError, match="no requirement"):
            unmet([text])


def test_an_extra_that_is_missing_is_missed() -> None:
    versions = {"harbour": "1.0"}
    requires_of = {"harbour": ["tidetable; extra == 'deep'", "seaside"]}
    assert unmet(["harbour"], versions.get, requires_of.__getitem__) == []
    assert unmet(["harbour[deep]"], versions.get, requires_of.__getitem__) == ["tidetable"]
    assert unmet(["harbour[deep]"], {**versions, "tidetable": "1"}.get, requires_of.__getitem__) == []


def test_only_wheels_of_this_machine_are_fetched() -> None:
    own = f"x-1-cp{sys.version_info[0]}{sys.version_info[1]}-none-any.whl"
    names = [
        "x-1-py3-none-any.whl",
        own,
        "x-1-cp311-cp311-win_amd64.whl",
        "x-1-cp27-none-any.whl",
        "nonsense.whl",
        "x.txt",
    ]
    assert fitting(names) == names[:2]


def test_what_flower_brings_needs_no_mention() -> None:
    direct = {
        name_of(text)
        for package in ("flwr", "fedtide")
        for text in requires(package) or ()
        if Requirement(text).marker is None
    }
    assert direct >= WITH_FLOWER  # newer versions of flwr ask for more
    assert worth_naming(["flwr[simulation]>=1.0", "numpy", "xgboost>=2"]) == ["xgboost>=2"]
    assert not_installed(["flwr[simulation]>=1.0", "flwr==1.20.0", "flwr-datasets==0.1"]) == ["flwr==1.20.0"]
    assert "flwr" not in beside_flower() and "pytest" in beside_flower()
