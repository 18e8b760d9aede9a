#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Write the bundles that are the adaptation bundle with other overlays: python tools/make_bundles.py [--check].

A method of this package is an overlay of ``bundles/mapseg_adaptation``. The Model Zoo wants bundles that stand alone.
``tools/made_bundles.yaml`` says which overlays such a bundle has for good, which it offers, and what its metadata says;
this tool merges the configs, leaves out what nothing refers to any more, and writes ``configs``, ``LICENSE`` and
``docs/settings.yaml`` of each. README, data licence and weights are the bundle's own. With --check nothing is written,
and the exit code is 1 if a file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mapseg_components.files import write_text
from mapseg_components.plans.bundle import overlaid
from tools.format_configs import formatted

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ROOT / "bundles"
ORIGIN = BUNDLES / "mapseg_adaptation"
LIST = ROOT / "tools" / "made_bundles.yaml"
BASES = ("train.json", "inference.json")
WHOLE = ("logging.conf", "evaluate.json", "multi_gpu_train.json")  # taken as they are
ROOTS = ("imports", "initialize", "run", "training")
REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*)")
NOTICE = "# Made by tools/make_bundles.py of the source repository from the same file of mapseg_adaptation.\n"


def references(value: Any) -> set[str]:
    """Top-level entries that a part of a config refers to."""
    if isinstance(value, str):
        return set(REFERENCE.findall(value))
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return set().union(*map(references, parts))


def needed(config: Mapping[str, Any], roots: Iterable[str]) -> set[str]:
    """Entries that the roots lead to, themselves among them."""
    found: set[str] = set()
    waiting = [name for name in roots if name in config]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in references(config[name]) if other in config]
    return found


def names_in(overlay: Mapping[str, Any]) -> set[str]:
    """Entries of the base that an overlay replaces, extends or refers to."""
    return {key.lstrip("+").split("#")[0] for key in overlay} | references(list(overlay.values()))


def files_of(name: str, asked: Mapping[str, Any]) -> dict[str, str]:
    """Content of each file that is made for a bundle, by its path in the bundle's folder.

    Args:
        name: of the bundle.
        asked: its entry in ``made_bundles.yaml``: ``overlays`` (merged), ``offers`` (kept as overlays), ``settings``
            (values on top), ``metadata`` (entries that replace those of the adaptation bundle).
    """
    configs = ORIGIN / "configs"
    loaded = {one: ConfigParser.load_config_file(configs / one) for one in asked["offers"]}
    offered = set().union(*map(names_in, loaded.values()))
    files = {f"configs/{one}": NOTICE + (configs / one).read_text(encoding="utf-8") for one in asked["offers"]}
    files |= {f"configs/{one}": (configs / one).read_text(encoding="utf-8") for one in WHOLE}
    files["LICENSE"] = (ORIGIN / "LICENSE").read_text(encoding="utf-8")
    for base in BASES:
        merged = overlaid(
            ConfigParser.load_config_file(configs / base), [configs / overlay for overlay in asked["overlays"]]
        )
        merged |= {key: value for key, value in asked.get("settings", {}).items() if key in merged}
        kept = set(merged)
        if base == "train.json":
            loaded_too = [ConfigParser.load_config_file(configs / overlay) for overlay in asked["overlays"]]
            merged = {k: v for own in loaded_too for k, v in own.items() if k.startswith("_")} | merged
            kept = needed(merged, {*ROOTS, *offered})
        files[f"configs/{base}"] = formatted(json.dumps({k: v for k, v in merged.items() if k in kept}))
    metadata = ConfigParser.load_config_file(configs / "metadata.json") | asked["metadata"]
    files["configs/metadata.json"] = formatted(json.dumps(metadata, ensure_ascii=False))
    return files


def meanings(bundle: Path) -> str:
    """The part of the adaptation bundle's ``docs/settings.yaml`` that is about settings of a made one."""
    own = set().union(*(ConfigParser.load_config_file(bundle / "configs" / base) for base in BASES))
    sections = yaml.safe_load((ORIGIN / "docs" / "settings.yaml").read_text(encoding="utf-8"))
    kept = {}
    for title, section in sections.items():
        settings = {name: meaning for name, meaning in section["settings"].items() if name in own}
        if settings:
            kept[title] = {**section, "settings": settings}
    return NOTICE + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=115)


def made_bundles() -> dict[str, dict[str, Any]]:
    """What is made, by the bundle's name."""
    return yaml.safe_load(LIST.read_text(encoding="utf-8"))


def main(line: Sequence[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that are out of date")
    check = parser.parse_args(line).check
    stale = []

    def settle(path: Path, wanted: str) -> None:
        if not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            stale.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(wanted, path)

    for name, asked in made_bundles().items():
        for file, content in files_of(name, asked).items():
            settle(BUNDLES / name / file, content)
        settle(BUNDLES / name / "docs" / "settings.yaml", meanings(BUNDLES / name))
    for path in stale:
        sys.stdout.write(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
