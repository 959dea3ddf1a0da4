"""The documentation as a site: every page is in it, it is built without a warning, and its links and formulas are there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.documents import DOCUMENTS, blocks
from tests.ranks import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SITE = REPOSITORY / "docs" / "site"


def pages(entries: list[dict[str, Any]]) -> list[str]:
    found = []
    for entry in entries:
        for target in entry.values():
            found += [target] if isinstance(target, str) else pages(target)
    return found


NAVIGATION = pages(tomllib.loads((SITE / "zensical.toml").read_text())["project"]["nav"])


class Page(HTMLParser):
    """Links, anchors and formulas of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.formulas = 0
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        self.anchors |= {values[name] or "" for name in ("id", "name") if name in values}
        self.formulas += tag == "math"


def test_every_page_has_a_place() -> None:
    documents = {*DOCUMENTS, *(REPOSITORY / "docs" / "results").rglob("*.md")}
    written = {document.relative_to(REPOSITORY).as_posix() for document in documents} - {"README.md"}
    assert set(NAVIGATION) == written | {"index.md", "docs/api.md", "CHANGELOG.md", "SECURITY.md"}
    assert len(NAVIGATION) == len(set(NAVIGATION))


def test_the_reference_names_what_is_there() -> None:
    named = re.findall(r"^::: (\S+)$", (SITE / "api.md").read_text(), re.MULTILINE)
    assert "flame_ext.train.run" in named
    for name in named:
        module, _, attribute = name.rpartition(".")
        is_module = (REPOSITORY / f"{name.replace('.', '/')}.py").is_file()
        file = REPOSITORY / f"{module.replace('.', '/')}.py"
        assert is_module or f"\ndef {attribute}(" in file.read_text(), name


@pytest.mark.matrix
@pytest.mark.skipif(find_spec("zensical") is None, reason="needs flame_ext[docs]")
def test_it_is_built_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "--silent", "site", f"SITE={tmp_path / 'site'}"]
    built = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    said = built.stdout + built.stderr
    assert (
        built.returncode == 0 and "No issues found" in said and not re.search("griffe|warning", said, re.IGNORECASE)
    ), said
    html = tmp_path / "site" / "html"
    found = {file: Page(file) for file in html.rglob("*.html") if file.name != "404.html"}
    assert len(found) == len(NAVIGATION)
    broken = []
    for file, page in found.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchored = not parts.fragment or target not in found or unquote(parts.fragment) in found[target].anchors
            if not target.is_file() or not anchored:
                broken.append(f"{file.relative_to(html)}: {link}")
    assert not broken
    for document in DOCUMENTS:
        formulas = [block for block in blocks(document) if block.language == "math"]
        name = document.relative_to(REPOSITORY).with_suffix("").as_posix()
        page = html / ("index.html" if name == "README" else f"{name}/index.html")
        assert found[page].formulas == len(formulas), document
    assert sum(page.formulas for page in found.values()) >= 8
    search = json.dumps(json.loads((html / "search.json").read_text()))
    assert "docs/objective/" in search and "flame_ext.train.run" in search
    everything = "".join(file.read_text() for file in found)
    assert not re.search(r"https?://[^\"' ]*(cdn|unpkg|jsdelivr|googleapis)", everything), (
        "nothing is loaded from elsewhere"
    )
