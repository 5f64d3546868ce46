"""Small wheels for tests, and an index of them as a folder."""

from __future__ import annotations

import zipfile
from pathlib import Path


def wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), tag: str = "py3-none-any", at_start: str = ""
) -> Path:
    """A wheel whose module `name` has a `VERSION`. `at_start`: what an interpreter runs that has it (`.pth`)."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {each}\n" for each in requires)
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if at_start:
        files[f"{name}-at-start.pth"] = f"import sys; {at_start}\n"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        lines = [f"{path},," for path in [*files, f"{info}/RECORD"]]
        archive.writestr(f"{info}/RECORD", "\n".join(lines) + "\n")
    return made


def index(folder: Path, wheels: list[Path]) -> str:
    """A package index (PEP 503) as a folder; its URL."""
    for each in wheels:
        page = folder / each.name.partition("-")[0] / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as file:
            file.write(f'<a href="{each.resolve().as_uri()}">{each.name}</a>\n')
    return folder.resolve().as_uri()
