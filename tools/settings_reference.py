#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference/settings.md from the bundles' configs: python tools/settings_reference.py [--check].

A setting is an entry at the top level of a config with a plain value, or with an expression if an overlay replaces it
by a plain value or a page of the documentation names it: as an option (``--name``), or in the first cell of a row.
Defaults, the paper's values and what overlays change are read from ``bundles/*/configs``; meanings and units from
``bundles/*/docs/settings.yaml``, which must describe every setting and nothing else. With --check nothing is written,
and the exit code is 1 if the page is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/reference/settings.md"
BASES = ("train", "inference")
"""Configs that stand alone; all others go on top of one of them."""
NOT_OVERLAYS = ("metadata.json",)
PAPER = "paper"
MADE = "# Made by"  # from another bundle, whose settings it has (tools/make_bundles.py)
WIRING = ("imports", "initialize", "run", "training", "finalize", "train", "validate", "backend")
OPTION, WORD = re.compile(r"--(\w+)"), re.compile(r"\w+")
ROWS = re.compile(r"^\|((?: `\w+`,?)+) \|", re.MULTILINE)
INTRODUCTION = """# Settings

Every setting of the bundles. `python tools/settings_reference.py` writes this page from the bundles' configs and
from the meanings in `bundles/*/docs/settings.yaml`. `buda_seg`, `cosmos_selftraining` and `brain_any_contrast` are made
from `mapseg_adaptation`, and have its settings as far as they need them.

A setting is changed in an overlay (`name: value`) or on the command line (`--name value`; null is `--name '$None'`).
*Used in* says which config has it: `train`, `inference`, or one that goes on top of them. *Paper* is its value with
`paper.yaml`, which turns off what the paper does not have; a dash where the paper says nothing. *Overlays* are those
that set another value than the default, without `paper*` where it is the paper's.
"""


@dataclass(frozen=True)
class Setting:
    """One row of the page.

    Args:
        name: its id in the configs.
        defaults: value by config: those of `BASES` that have it, else those on top that do.
        changes: value by overlay, where it is another than each default.
        paper: value with ``paper.yaml``.
    """

    name: str
    defaults: dict[str, Any]
    changes: dict[str, Any]
    paper: Any


def settings_of(bundle: Path, options: Collection[str] = ()) -> dict[str, Setting]:
    """Settings of a bundle, in the order of its configs.

    Args:
        bundle: its folder.
        options: names of entries that are settings also where they are expressions.
    """
    configs = {
        path.stem: ConfigParser.load_config_file(path)
        for path in sorted((bundle / "configs").iterdir())
        if path.suffix in (".json", ".yaml") and path.name not in NOT_OVERLAYS
    }
    bases = {name: configs.pop(name) for name in BASES if name in configs}
    standalone = {path.stem for path in (bundle / "configs").glob("*.json")}
    own = {name: content for name, content in configs.items() if name in standalone}
    known = dict.fromkeys(key for content in (*bases.values(), *own.values()) for key in content)
    found = {}
    for key in known:
        defaults = {name: content[key] for name, content in bases.items() if key in content}
        defaults = defaults or {name: content[key] for name, content in own.items() if key in content}
        sets = {name: content[key] for name, content in configs.items() if key in content and name not in defaults}
        values = list(defaults.values())
        named = key in options or any(map(is_plain, sets.values()))
        if not is_setting(key, values, named):
            continue
        changes = {name: value for name, value in sets.items() if any(value != default for default in values)}
        found[key] = Setting(key, defaults, changes, sets.get(PAPER, defaults.get("train", values[0])))
    return found


def is_setting(key: str, values: Sequence[Any], named: bool) -> bool:
    """Whether an entry is a setting.

    Args:
        key: of the entry.
        values: it has in the configs.
        named: whether an overlay sets it to a plain value, or something names it as an option.
    """
    if key in WIRING or "#" in key or key.startswith(("_", "+")):
        return False
    return all(is_plain(value) or (named and is_expression(value)) for value in values)


def is_expression(value: Any) -> bool:
    """Whether a value is text that MONAI evaluates or resolves."""
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def is_plain(value: Any) -> bool:
    """Whether a value holds no expression, and no component."""
    if isinstance(value, Mapping):
        return "_target_" not in value and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return not is_expression(value)


def meanings_of(bundle: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Section to setting to ``meaning``, ``unit`` and ``paper``, from ``docs/settings.yaml`` of a bundle.

    Raises:
        ConfigError: the file cannot be read, or a setting has no meaning, or another key, or is described twice.
    """
    path = bundle / "docs" / "settings.yaml"
    found: dict[str, dict[str, dict[str, Any]]] = {}
    seen: set[str] = set()
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): correct it") from error
    for section, content in sections.items():
        found[section] = {}
        for name, entry in content["settings"].items():
            given = dict(entry) if isinstance(entry, Mapping) else {"meaning": entry}
            given.setdefault("paper", content.get("paper", True))
            unknown = sorted(set(given) - {"meaning", "unit", "paper"})
            if unknown or not given.get("meaning"):
                what = f"the unknown key {unknown[0]!r}" if unknown else "no meaning"
                raise ConfigError(f"{path}: {name} has {what}: write meaning, and if needed unit and paper")
            if name in seen:
                raise ConfigError(f"{path}: {name} is described twice: remove one")
            seen.add(name)
            found[section][name] = given
    return found


def page(root: Path = ROOT) -> str:
    """The page, for the bundles below a folder.

    Raises:
        ConfigError: a setting has no meaning, or a meaning no setting; names all of them and the file.
    """
    text = [INTRODUCTION]
    for bundle in sorted((root / "bundles").iterdir()):
        if not (bundle / "configs" / "train.json").is_file():
            continue
        if (bundle / "docs" / "settings.yaml").read_text(encoding="utf-8").startswith(MADE):
            continue
        meanings = meanings_of(bundle)
        described = {name for entries in meanings.values() for name in entries}
        settings = settings_of(bundle, described | named_options(root, bundle))
        problems = [f"{name} has no meaning" for name in settings if name not in described]
        problems += [f"{name} is no setting of its configs" for name in sorted(described - set(settings))]
        if problems:
            raise ConfigError(f"{bundle / 'docs' / 'settings.yaml'}: {', '.join(problems)}: add or remove the lines")
        text.append(f"## {bundle.name}\n")
        papers = sorted(path.stem for path in (bundle / "configs").glob(f"{PAPER}*.yaml"))
        for section, entries in meanings.items():
            text += [f"### {section}\n", HEAD]
            text += [row(settings[name], entry, papers) for name, entry in entries.items()]
            text.append("")
    return "\n".join(text).rstrip() + "\n"


def named_options(root: Path, bundle: Path) -> set[str]:
    """Options that pages for users name; not the page that is written here."""
    found: set[str] = set()
    for path in (root / "README.md", bundle / "docs" / "README.md", *(root / "docs").rglob("*.md")):
        if path.is_file() and path != root / PAGE:
            text = path.read_text(encoding="utf-8")
            found |= {*OPTION.findall(text), *(name for cells in ROWS.findall(text) for name in WORD.findall(cells))}
    return found


HEAD = "| setting | meaning | unit | used in | default | paper | overlays |\n|---|---|---|---|---|---|---|"


def row(setting: Setting, entry: Mapping[str, Any], papers: Sequence[str]) -> str:
    """One line of a table.

    Args:
        setting: what the configs say.
        entry: what ``settings.yaml`` says.
        papers: names of the overlays of the paper's settings, which are put together where they agree.
    """
    values = grouped(setting.defaults)
    shown = ", ".join(value if len(values) == 1 else f"{value} {' '.join(names)}" for value, names in values.items())
    paper = cell(setting.paper) if entry["paper"] else "-"
    groups = {value: shortened(names, papers, value == paper) for value, names in grouped(setting.changes, 18).items()}
    changes = "; ".join(f"{value} {', '.join(names)}" for value, names in groups.items() if names)
    used = ", ".join(setting.defaults)
    columns = [f"`{setting.name}`", entry["meaning"], entry.get("unit", ""), used, shown, paper, changes]
    return "| " + " | ".join(str(column).replace("|", "\\|") for column in columns) + " |"


def grouped(values: Mapping[str, Any], longest: int = 40) -> dict[str, list[str]]:
    """Names by the value that they share, as `cell` shows it."""
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        found.setdefault(cell(value, longest), []).append(name)
    return found


def shortened(names: Sequence[str], papers: Sequence[str], shown: bool) -> list[str]:
    """Names of overlays; ``paper*`` for all that begin so, none of these where the paper's value is shown anyway."""
    if not set(papers) <= set(names):
        return list(names)
    return [f"{PAPER}\\*"] * (not shown) + [name for name in names if name not in papers]


def cell(value: Any, longest: int = 40) -> str:
    """A value as the page shows it; of a longer expression, that it is one."""
    if isinstance(value, Mapping) and value:
        return f"{len(value)} entries"
    text = value if is_expression(value) else json.dumps(value, ensure_ascii=False)
    return "computed" if is_expression(value) and len(text) > longest else f"`{text}`"


def main(line: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is not up to date")
    arguments = parser.parse_args(line)
    try:
        text, path = page(root), root / PAGE
        if arguments.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                raise ConfigError(f"{path} is not up to date: run python tools/settings_reference.py")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(text, path)
    except MAPSegError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1 if arguments.check else error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
