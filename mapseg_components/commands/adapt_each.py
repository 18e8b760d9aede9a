# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""``mapseg predict --adapt_each``: a bundle's weights are adapted to one scan, used if that helped, and put back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from mapseg_components.configs import parser_of
from mapseg_components.errors import ConfigError, ResourceError, user_error
from mapseg_components.handover import HandoverPackage, package_of_bundle
from mapseg_components.keys import IMAGE, MASK
from mapseg_components.prediction.bundle import InferenceBundle
from mapseg_components.prediction.intake import Todo
from mapseg_components.quality import VIEWS, consistency, mean_consistencies, within_shares
from mapseg_components.scans.files import is_picture
from mapseg_components.shipped_files import bundles_folder
from mapseg_components.transforms.inputs import outside_tissue

__all__ = ["ADAPTED", "ROLLED_BACK", "ScanAdaptation", "ask_for"]

logger = logging.getLogger(__name__)

ADAPTED, ROLLED_BACK = "adapted", "rolled back"
# of the adaptation bundle: contrast consistency on the target alone
CONFIGS = ("train.json", "from_source.yaml", "contrast_consistency.yaml", "handover.yaml", "test_time.yaml")
# for some tens of steps: a teacher that follows in ten of them, which is what is kept, and one patch a step
FEW_STEPS = {"ema_schedule": [[None, 0.9]], "learning_rate": 1e-4, "batch_size": 1, "max_epochs": 1, "resume": False}
WITHOUT_FILES = [
    {
        "_target_": "mapseg_components.handlers.HandlerChain",
        "handlers": ["@load_initial_weights", "@teacher"],
    }
]
AS_PREDICTED = ("device", "target_inverted", "assume_orientation", "non_finite", "rgb")  # settings of inference


def ask_for(bundle: InferenceBundle, home: Path, steps: int, seed: int) -> None:
    """Note in a bundle's settings that each scan is adapted to, after a check whether it can be.

    Args:
        bundle: that is used.
        home: its folder.
        steps: of the optimizer for each scan; 0 for none, and nothing is noted.
        seed: of each scan's adaptation.

    Raises:
        ConfigError: the number of steps is negative, there are several weights, or the bundle has no config of
            training.
    """
    if steps < 0:
        raise ConfigError(f"adapt_each is {steps}, expected a number of steps, such as 20, or 0 for none")
    if not steps:
        return
    if len(bundle.members) > 1:
        raise ConfigError(
            f"adapt_each adapts one network, and {len(bundle.members)} weights are given: name one file of weights"
        )
    if not (home / "configs" / "train.json").is_file():
        raise ConfigError(
            f"adapt_each needs the settings of training, and {home} has no configs/train.json: name a bundle that "
            "mapseg adapt wrote"
        )
    bundle["adapt_each"] = {"steps": steps, "seed": seed}


class ScanAdaptation:
    """Adapts a bundle's network to a scan, and to nothing else, while the scan is segmented.

    By contrast consistency without the source, as ``mapseg adapt --method test_time``, from the bundle's weights each
    time and with the same seed, so that no scan depends on another one or on their order. The adapted weights are used
    if their label map of the scan is more consistent than that of the bundle's weights, see
    `mapseg_components.quality.mean_consistencies`; no weights are written.

    Args:
        bundle: that is used, after `ask_for`; its weights are in its network.
        folder: for its hand-over package; gone after the run.

    Raises:
        ConfigError: its network cannot be adapted.
        CheckpointError: its weights do not fit.
    """

    def __init__(self, bundle: InferenceBundle, folder: Path) -> None:
        asked = bundle["adapt_each"]
        self.steps, self.seed = int(asked["steps"]), int(asked["seed"])
        self.network, self.plain, self.inferer = bundle["network_def"], bundle["network"], bundle["inferer"]
        self.device, self.classes = bundle["device"], len(bundle.names) + 1
        self.original = {name: value.clone() for name, value in self.network.state_dict().items()}
        home = Path(bundle["bundle_root"])
        package: HandoverPackage = package_of_bundle(home, folder, bundle.parser.config, bundle.members[0])
        self.ranges = [package.share_ranges.get(name) for name in bundle.names]
        shipped = bundles_folder() / "mapseg_adaptation"
        self.config = ConfigParser.load_config_files([str(shipped / "configs" / name) for name in CONFIGS])
        trained = ConfigParser.load_config_file(home / "configs" / "train.json")
        used = bundle.parser.config
        self.settings = {name: used[name] for name in AS_PREDICTED if name in used}
        self.settings |= {
            **FEW_STEPS,
            "amp": trained.get("amp"),
            "bundle_root": str(folder),
            "handover_dir": str(folder),
            "epoch_length": self.steps,
            "seed": self.seed,
            "train#handlers": WITHOUT_FILES,
            "train#target_dataset#progress": False,
        }

    @contextlib.contextmanager
    def __call__(self, todo: Todo, batch: Mapping[str, Any]) -> Iterator[None]:
        """Context in which the bundle's network has the weights to segment a scan with; the scan's record says which.

        Args:
            todo: the scan and its case.
            batch: the scan as the network takes it, a batch of one.

        Raises:
            ResourceError: memory ran out. After other errors of the adaptation the scan is segmented without it.
        """
        one, case = todo
        try:
            one.adaptation = self.judged(case, batch[IMAGE][0])
            yield
        finally:
            self.network.load_state_dict(self.original)

    def judged(self, case: Mapping[str, Any], image: torch.Tensor) -> dict[str, Any]:
        """Adapt to a scan and compare; the network keeps the better weights. Returns what the record says.

        Args:
            case: of the scan.
            image: (C, X, Y, Z), preprocessed.
        """
        found: dict[str, Any] = {"used": ROLLED_BACK, "steps": self.steps, "gain": None}
        before = self.stability(image)
        try:
            adapted = self.adapted(case)
        except Exception as error:
            known = user_error(error)
            if known is None or isinstance(known, ResourceError):
                raise
            logger.warning(f"{case[IMAGE]} is segmented without adaptation: {known}")
            return found | {"why": type(known).__name__}
        self.network.load_state_dict(adapted)
        scores = mean_consistencies(before, self.stability(image))
        gain = scores[1] - scores[0]
        found |= {"consistency": [round(score, 4) for score in scores], "gain": round(gain, 4)}
        if gain > 0:
            return found | {"used": ADAPTED}
        self.network.load_state_dict(self.original)
        return found

    def adapted(self, case: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Weights after the steps on one scan."""
        parser = parser_of(self.config)
        of_scan = {
            "train#target_dataset#data": [dict(case)],
            "pseudo_labels#ignore_outside": is_picture(case[IMAGE]) or MASK in case,
        }
        for name, value in (self.settings | of_scan).items():
            parser[name] = value
        set_determinism(seed=self.seed)
        parser.get_parsed_content("train#trainer").run()
        return parser.get_parsed_content("teacher_network").state_dict()

    def stability(self, image: torch.Tensor) -> torch.Tensor:
        """Consistency (structures,) of the network as it is; 0 for a structure whose share is out of its range."""
        self.network.eval()

        @torch.no_grad()
        def segment(shown: torch.Tensor) -> torch.Tensor:
            logits = self.inferer(shown[None].to(self.device), self.plain)[0]
            return logits.as_subclass(torch.Tensor).max(dim=0).indices.cpu()

        outside, shown = outside_tissue(image), image.as_subclass(torch.Tensor)
        label_map = segment(shown)
        if outside is not None:
            label_map = label_map.masked_fill(outside, 0)
        inside = within_shares(label_map, self.ranges)
        stable = consistency(shown, label_map, segment, self.classes, views=VIEWS, outside=outside)
        return torch.where(inside > 0, stable, torch.zeros_like(stable))
