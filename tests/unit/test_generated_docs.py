"""What the documentation says of types is what the types say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
CHARTS = DOCS.parent / "deploy"
ALL = [*sorted(DOCS.glob("*.md")), CHARTS / "cloud/fedtide/README.md", CHARTS / "k3s/fedtide-edge/README.md"]
PAGES = [page for page in ALL if "<!-- generated" in page.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_a_page_is_as_it_is_generated(page: Path, generate: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.generated(text) == text, "run `make docs`"


def test_every_part_is_on_a_page(generate: ModuleType) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in generate.PARTS if f"<!-- generated: {name} -->" not in text] == []
