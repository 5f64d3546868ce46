"""What the documentation says of types is what the types say."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
CHARTS = DOCS.parent / "deploy"
BOTH = (CHARTS / "cloud/fedtide", CHARTS / "k3s/fedtide-edge")
ALL = [*sorted(DOCS.glob("*.md")), *(chart / "README.md" for chart in BOTH)]
PAGES = [page for page in ALL if "<!-- generated" in page.read_text(encoding="utf-8")]
FILES = [*PAGES, *(chart / "values.schema.json" for chart in BOTH)]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        return importlib.import_module("generate")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_a_file_is_as_it_is_generated(file: Path, generate: ModuleType) -> None:
    assert generate.files()[file] == file.read_text(encoding="utf-8"), "run `make docs`"


def test_every_part_is_on_a_page(generate: ModuleType) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in generate.PARTS if f"<!-- generated: {name} -->" not in text] == []
