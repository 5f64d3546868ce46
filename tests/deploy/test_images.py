"""The Dockerfiles, read: they cannot be built here, so what they name must at least be there."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))
KNOWN = ("FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "LABEL", "USER", "ENTRYPOINT")


def _instructions(file: Path) -> list[tuple[str, str]]:
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.mark.parametrize("file", IMAGES, ids=lambda f: f.stem)
def test_what_an_image_copies_installs_and_starts_is_there(file: Path) -> None:
    instructions = _instructions(file)
    assert {word for word, _ in instructions} <= set(KNOWN)
    assert sum(word == "FROM" for word, _ in instructions) == 2
    copied = [rest.split()[:-1] for word, rest in instructions if word == "COPY" and "--from" not in rest]
    assert all((ROOT / name).exists() for names in copied for name in names)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = " ".join(rest for word, rest in instructions if word in ("RUN", "ARG"))
    for group in [*re.findall(r'"\.\[([a-z,]+)\]"', named), *re.findall(r"EXTRAS=([a-z,]+)", named)]:
        assert set(group.split(",")) <= set(extras), group
    (entry,) = [json.loads(rest) for word, rest in instructions if word == "ENTRYPOINT"]
    assert entry == ["fedtide", "agent"] or importlib.util.find_spec(entry[2]) is not None


@pytest.mark.parametrize("file", IMAGES, ids=lambda f: f.stem)
def test_an_image_ends_as_a_user_without_build_tools(file: Path) -> None:
    instructions = _instructions(file)
    last = max(i for i, (word, _) in enumerate(instructions) if word == "FROM")
    final = instructions[last:]
    assert ("USER", "10001:10001") in final
    assert not any(
        word == "RUN" and ("apt" in rest or " install" in rest.replace("uninstall", "")) for word, rest in final
    )
    assert any("pip uninstall" in rest for word, rest in final if word == "RUN")
    assert any(word == "LABEL" and "org.opencontainers.image.version" in rest for word, rest in final)
