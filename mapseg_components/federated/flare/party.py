# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""What a party of an NVFlare federation knows of itself, read from its own disk: bundle, settings and scans.

A job carries none of it. Each party has a folder, ``$MAPSEG_PARTY_DIR`` (default ``~/.mapseg``), with one file of its
own, ``<its name>.json``::

    {
        "bundle_root": "/opt/bundles/mapseg_adaptation",
        "config_files": ["train.json", "fetal_age.yaml", "federated.json"],
        "settings": {"datalist": "/data/mapseg/datalist.json", "output_dir": "/data/mapseg/eval"}
    }

``settings`` are overrides as on the command line of ``monai.bundle``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from mapseg_components.configs import check_settings, parser_of
from mapseg_components.errors import ConfigError
from mapseg_components.federated.plan import Plan
from mapseg_components.federated.site import Site
from mapseg_components.keys import SOURCE, TARGET

__all__ = ["PARTY_DIR", "Party"]

PARTY_DIR = "MAPSEG_PARTY_DIR"


def sides_of(sites: Sequence[str], source_site: str | None = None) -> dict[str, str]:
    """Side of every client of a job: those with target scans, then the one with the source, if the server has none.

    Raises:
        ConfigError: the site with the source is among those with target scans.
    """
    if source_site in sites:
        raise ConfigError(f"{source_site} is the source site and one of the sites with target scans: give it one side")
    return {**dict.fromkeys(sites, TARGET), **({source_site: SOURCE} if source_site else {})}


@dataclass(frozen=True)
class Party:
    """Settings of one party.

    Args:
        name: as NVFlare knows it; ``"server"`` for the server.
        settings: merged config.
        plan: of these settings.
        datalist: value of that setting.
        ckpt_dir: value of that setting.
        output_dir: value of that setting.
        resume: of these settings.
    """

    name: str
    settings: dict[str, Any]
    plan: Plan
    datalist: str
    ckpt_dir: str
    output_dir: str
    resume: bool

    @classmethod
    def read(cls, name: str) -> Party:
        """Read ``<name>.json``.

        Raises:
            ConfigError: it is missing or incomplete, or a setting is unknown.
        """
        path = Path(os.environ.get(PARTY_DIR, Path.home() / ".mapseg")) / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            folder = Path(content["bundle_root"]) / "configs"
            files = [folder / file for file in content["config_files"]]
            changes = dict(content["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be used ({type(error).__name__}: {error}): write bundle_root, config_files and "
                f"settings of {name} into it, or set {PARTY_DIR} to its folder"
            ) from error
        parser = ConfigParser()
        parser.read_config(files)
        parser.update({"bundle_root": content["bundle_root"], **changes})
        settings = parser.config
        check_settings(settings, folder, parser.locator)
        get = parser_of(settings).get_parsed_content
        return cls(
            name,
            settings,
            get("federation"),
            *(str(get(key)) for key in ("datalist", "ckpt_dir", "output_dir")),
            bool(get("resume")),
        )

    def site(self, side: str) -> Site:
        """This party's side of the training."""
        return Site(
            self.name, side, self.plan, self.settings, self.datalist, Path(self.output_dir) / "sites" / self.name
        )
