# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What setup.cfg cannot say: bundles and samples go into the wheel, and its README has no link that leads nowhere."""

from __future__ import annotations

import posixpath
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = "mapseg_components/shipped"  # mapseg_components/shipped_files.py looks here
SAMPLE = ("LICENSE.txt", "datalist.json", "*.md", "SHA256SUMS", "*/images/*.nii.gz", "*/labels/*.nii.gz")
BUNDLE = ("LICENSE", "configs/*", "docs/*", "models/model.pt")
# folder, what it must hold; results of runs in a clone stay out
CONTENT = {
    "bundles/brain_any_contrast": BUNDLE,
    "bundles/buda_seg": BUNDLE,
    "bundles/cosmos_selftraining": BUNDLE,
    "bundles/cosmos_translation": BUNDLE,
    "bundles/mapseg_adaptation": (*BUNDLE, "recipes/*"),
    "bundles/mapseg_pretraining": BUNDLE,
    "sample/adult_t1_to_t2": SAMPLE,
    "sample/fetal_age": SAMPLE,
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def shipped_files(root: Path = ROOT) -> list[str]:
    """Files of the bundles and the samples that an installation carries, relative to the repository, sorted."""
    found = []
    for folder, patterns in CONTENT.items():
        for pattern in patterns:
            files = [path for path in (root / folder).glob(pattern) if path.is_file() and path.name[0] != "."]
            if not files:
                raise SystemExit(f"{root / folder / pattern} does not exist: the package would not be whole")
            found += [path.relative_to(root).as_posix() for path in files]
    return sorted(found)


def readme_for_packages(text: str, source: str | None) -> str:
    """The README where there is no repository around it, as on a package index.

    Args:
        text: of the README. source: address of the repository (``Source`` of ``project_urls``); without one a link
            to a file becomes its text with the file's name, and a picture what it shows.
    """

    def lead(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        if source:
            way = "raw" if match["image"] else "blob"
            return f"{match['image']}[{match['text']}]({source.rstrip('/')}/{way}/main/{posixpath.normpath(target)})"
        if match["image"]:
            return f"*{match['text']}* ({target})"
        name = target.partition("#")[0]
        return match["text"] if name in match["text"] else f"{match['text']} ({name})"

    return LINK.sub(lead, text)


class BuildWithShipped(build_py):
    """Adds bundles and samples below the package; an editable installation finds them in the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / SHIPPED
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in shipped_files():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def source_address() -> str | None:
    """``Source`` of ``project_urls`` in setup.cfg."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = settings["metadata"]["project_urls"].strip().splitlines()
    return {name.strip(): url.strip() for name, _, url in (line.partition("=") for line in lines)}.get("Source")


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": BuildWithShipped},
        long_description=readme_for_packages((ROOT / "README.md").read_text(encoding="utf-8"), source_address()),
        long_description_content_type="text/markdown",
    )
