# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Hook of MkDocs: links from pages to files of the repository outside ``docs``.

``[train.json](../bundles/mapseg_adaptation/configs/train.json)`` works where the repository is read as files. On the
site the file is copied to ``repository/...`` and the link leads there, so that the site needs no address of a server. A
link to a file that does not exist stays as it is, and MkDocs warns of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?P<path>\.\./[^)#\s]+)(?=[)#])")
# browsers show these; others they would offer to save
SHOWN_AS_TEXT = {".md", ".py", ".yaml", ".yml", ".cff", ".conf", ""}


def repository_file(page: str, link: str, docs: Path) -> Path | None:
    """The file outside ``docs`` that a page links to, relative to the repository; None if there is none.

    Args:
        page: the page's path below ``docs``.
        link: relative to the page.
        docs: the folder of pages.
    """
    name = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    inside = name.startswith("docs/") or name.startswith("..")
    return None if inside or not (docs.parent / name).is_file() else Path(name)


def name_on_site(path: Path) -> str:
    """Path on the site; text that has no ending known to browsers gets ``.txt``."""
    return f"repository/{path.as_posix()}" + (".txt" if path.suffix in SHOWN_AS_TEXT else "")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the page's links to copies of the repository's files, and add these to the site."""

    def lead(match: re.Match[str]) -> str:
        path = repository_file(page.file.src_uri, match["path"], Path(config.docs_dir))
        if path is None:
            return match["path"]
        name = name_on_site(path)
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(Path(config.docs_dir).parent / path)))
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(lead, markdown)
