# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mapseg_components.commands.main import COMMANDS
from tests.conftest import ROOT

DOCS = ROOT / "docs"
API = DOCS / "reference" / "api.md"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    listed = set(re.findall(r":\s+(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= listed, f"add to nav of mkdocs.yml: {sorted(pages - listed)}"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = re.findall(r"\S+\.md", str(nav).replace("'", " "))
    assert [name for name in entries if not (DOCS / name).is_file()] == []


def test_every_room_of_the_package_has_its_section():
    rooms = {path.stem for path in (ROOT / "mapseg_components").iterdir() if not path.name.startswith(("_", "py."))}
    listed = set(re.findall(r"^::: mapseg_components\.(\w+)", API.read_text(), re.MULTILINE))
    assert listed == rooms


def test_every_command_is_documented_as_a_function():
    listed = re.findall(r"^::: mapseg_components\.commands\.(.+)$", API.read_text(), re.MULTILINE)
    assert listed == [f"{name}.{name}" for name in COMMANDS]


def test_the_search_of_pages_opened_from_disk_asks_no_server():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert "offline" in settings["plugins"]
    scripts = settings["extra"]["polyfills"]
    # the plugin adds an address of its own unless it finds this name
    assert [name for name in scripts if "iframe-worker" in name] and all((DOCS / name).is_file() for name in scripts)


@pytest.mark.slow
def test_the_built_site_has_all_commands_and_loads_nothing_from_elsewhere(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="the site needs the extra [docs]")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert [
        name for name, text in pages.items() if re.search(r"<(script|link|img)[^>]*(src|href)=.?https?:", text)
    ] == []
    assert "__getattr__" not in pages["reference/api.html"]
    assert all(f'id="mapseg_components.commands.{name}.{name}"' in pages["reference/api.html"] for name in COMMANDS)
    assert (tmp_path / "search" / "search_index.js").read_text().startswith("var __index = {")


def test_links_out_of_the_docs_lead_to_files():
    pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
    from tools.docs_links import LINK, name_on_site, repository_file

    broken = [
        (page.name, match["path"])
        for page in DOCS.rglob("*.md")
        for match in LINK.finditer(page.read_text())
        if repository_file(page.relative_to(DOCS).as_posix(), match["path"], DOCS) is None
        and not (page.parent / match["path"]).is_file()
    ]
    assert broken == []
    assert repository_file("tutorials/a.md", "../../LICENSE", DOCS) == Path("LICENSE")
    assert repository_file("tutorials/a.md", "../index.md", DOCS) is None  # a page, which MkDocs itself links
    assert repository_file("a.md", "../../outside", DOCS) is None
    assert name_on_site(Path("tools/demo.py")) == "repository/tools/demo.py.txt"
