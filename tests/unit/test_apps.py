"""App directories: what is read from them, and what is refused with which words."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.flower.app_files import bundle
from fedtide.fabric.flower.apps import describe, fuse, unpack
from tests.conftest import APPS

GOOD = """
[project]
name = "thing"
[tool.flwr.app.components]
serverapp = "s:app"
clientapp = "c:app"
[tool.flwr.app.config]
rate = 0.1
rounds = 3
deep.er = "x"
"""


def _app(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_nested_config_is_read_as_dotted_keys(tmp_path: Path) -> None:
    assert describe(_app(tmp_path, GOOD)).config == {"rate": 0.1, "rounds": 3, "deep.er": "x"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not toml", "not valid TOML"),
        ("[project]\nname='x'", "serverapp"),
        (GOOD.replace('"c:app"', '"c"'), "clientapp"),
        (GOOD + "list = [1]", "config.list"),
        (GOOD + "[tool.fedtide.app]\nexport='e:f'", "`model` is not"),
        (GOOD + "[tool.fedtide.app]\nmodle='m'", "modle"),
        (GOOD + "[tool.fedtide.app]\nmodel='a.b'", "'a.b' is not a valid name"),
    ],
)
def test_a_broken_app_is_refused_by_naming_the_field(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        describe(_app(tmp_path, text))


def test_a_missing_directory_or_pyproject_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such app directory"):
        describe(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no pyproject\.toml"):
        describe(tmp_path)


def test_overrides_must_be_declared_and_of_the_declared_type() -> None:
    defaults = {"rate": 0.1, "rounds": 3, "name": "x", "flag": True}
    assert fuse(defaults, {"rate": 1, "rounds": 5}) == {**defaults, "rate": 1.0, "rounds": 5}
    for overrides in ({"speed": 1}, {"rounds": "many"}, {"flag": 1}, {"rounds": 1.5}):
        with pytest.raises(ConfigError):
            fuse(defaults, overrides)


def test_the_same_files_give_the_same_bundle_and_caches_stay_out(tmp_path: Path) -> None:
    app = _app(tmp_path, GOOD)
    first = bundle(app)
    (app / "__pycache__").mkdir()
    (app / "__pycache__" / "x.pyc").write_bytes(b"x")
    (app / ".secret").write_text("x")
    assert bundle(app) == first
    (app / "data.csv").write_text("1")
    assert bundle(app) != first


def test_a_bundle_comes_back_whole(tmp_path: Path) -> None:
    unpack(bundle(APPS / "mean"), tmp_path / "out")
    assert describe(tmp_path / "out") == describe(APPS / "mean")
    assert (tmp_path / "out" / "mean_client.py").read_bytes() == (APPS / "mean" / "mean_client.py").read_bytes()


def test_a_bundle_that_leaves_its_folder_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../evil.py", "x")
    with pytest.raises(MalformedMessage, match="leaves its folder"):
        unpack(evil.getvalue(), tmp_path / "in" / "app")
    with pytest.raises(MalformedMessage, match="not a zip"):
        unpack(b"nonsense", tmp_path / "in" / "app")
    assert list((tmp_path / "in").iterdir()) == []
    assert not (tmp_path / "evil.py").exists()
