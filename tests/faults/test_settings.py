# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""A setting is refused or has an effect; it is never ignored (row T14)."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from mapseg_components.configs import SECTIONS, check_settings, known_keys
from mapseg_components.errors import ConfigError
from tests.conftest import ROOT

FOLDERS = [ROOT / "bundles" / name / "configs" for name in ("mapseg_adaptation", "mapseg_pretraining")]
NAMES = ["train.json", "inference.json"]
# read by MONAI itself or only wiring
# the last two are run by overlays: test_time.yaml, source_stage.yaml, handover_only.yaml
STRUCTURE = {"imports", "run", "training", "initialize", "handover", "write_handover"}
READ_BY_COMMANDS = {"foreground_mm"}  # by predict, and by adapt of a package


def merged(folder, name):
    return ConfigParser.load_config_file(folder / name)


def places(config, path=()):
    """Paths of all keys that `check_settings` vouches for: top level, sections, arguments of components."""
    for key, value in config.items():
        judged = not path or path in [(section,) for section in SECTIONS] or "_target_" in config
        if judged and not str(key).startswith("_"):
            yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.parent.name)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_misspelt_key_anywhere_is_refused(folder, name, data):
    config = merged(folder, name)
    check_settings(config, folder)
    path = data.draw(st.sampled_from(sorted(places(config), key=str)))
    key = path[-1]
    edit = data.draw(st.sampled_from(["drop", "double", "swap", "upper"]))
    at = data.draw(st.integers(0, len(key) - 1))
    typo = {
        "drop": key[:at] + key[at + 1 :],
        "double": key[:at] + key[at] + key[at:],
        "swap": key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
        "upper": key[:at] + key[at].upper() + key[at + 1 :],
    }[edit]
    parent = config
    for part in path[:-1]:
        parent = parent[part]
    known = known_keys(folder)[path[0] if len(path) == 2 and path[0] in SECTIONS else ""] if len(path) <= 2 else set()
    assume(typo and typo not in parent and typo not in known and not typo.startswith("_"))
    parent[typo] = parent.pop(key)
    if len(path) > 1 and "_target_" in parent and takes_keywords(parent["_target_"]):
        return  # **kwargs: the component itself says so when it is made
    with pytest.raises(ConfigError, match="unknown setting"):
        check_settings(config, folder)


def takes_keywords(target):
    """Of MONAI's and torch's classes in the configs, those with ``**kwargs``."""
    return target in ("AsDiscreted", "DataLoader", "LossProgressBar", "mapseg_components.handlers.LossProgressBar") or (
        target.startswith(("ignite.handlers.ProgressBar", "SupervisedEvaluator"))
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.parent.name)
@pytest.mark.parametrize("name", NAMES)
def test_every_knob_reaches_something(folder, name):
    """A knob that no expression refers to, nor one of an overlay of a method, could be set without effect.

    With a method that does not read it, `mapseg_components.plans.effects.check_effects` refuses it.
    """
    config = merged(folder, name)
    wiring = json.dumps(config) + "".join(path.read_text() for path in sorted(folder.glob("*.yaml")))
    for key in set(config) - STRUCTURE - READ_BY_COMMANDS:
        if not isinstance(config[key], dict) or "_target_" in config[key]:
            assert re.search(rf"[@%]{key}\b", wiring), f"{name}: {key} has no effect"
