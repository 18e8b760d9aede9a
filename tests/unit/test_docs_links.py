# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mapseg_components.commands.main import COMMANDS
from tests.conftest import ROOT

DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    listed = set(re.findall(r":\s+(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= listed, f"add to nav of mkdocs.yml: {sorted(pages - listed)}"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = re.findall(r"\S+\.md", str(nav).replace("'", " "))
    assert [name for name in entries if not (DOCS / name).is_file()] == []


def test_every_room_of_the_package_has_its_section():
    rooms = {path.stem for path in (ROOT / "mapseg_components").iterdir() if not path.name.startswith(("_", "py."))}
    listed = set(re.findall(r"^::: mapseg_components\.(\w+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert listed == rooms


def test_every_command_is_documented_as_a_function():
    listed = re.findall(r"^::: mapseg_components\.commands\.(.+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert listed == [f"{name}.{name}" for name in COMMANDS]


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
    assert repository_file("tutorials/a.md", "../data.md", DOCS) is None  # a page, which MkDocs itself links
    assert repository_file("a.md", "../../outside", DOCS) is None
    assert name_on_site(Path("tools/demo.py")) == "repository/tools/demo.py.txt"
