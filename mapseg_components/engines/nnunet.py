# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Training by nnU-Net, through MONAI's runner, on a datalist of this package."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.apps.nnunet import nnUNetV2Runner

from mapseg_components.checkpoints import weights_of, write_atomic
from mapseg_components.engines.nnunet_dataset import write_dataset
from mapseg_components.errors import NonFiniteError
from mapseg_components.files import replacing, write_json, write_text
from mapseg_components.inferers.nnunet import PLANS, mirrored_axes, part, require_nnunet

__all__ = ["NNUNetTraining"]

logger = logging.getLogger(__name__)

NUMBER, NAME = 1, "Dataset001_mapseg"
WEIGHTS, PREPARED = "nnunet.pt", "prepared.json"
AUGMENTING = "nnUNet_n_proc_DA"  # nnU-Net's variable for the number of processes that augment
# column of history.jsonl to what nnU-Net calls it
HISTORY = {
    "loss": "train_losses",
    "validation_loss": "val_losses",
    "validation_patch_dice": "mean_fg_dice",
    "learning_rate": "lrs",
}


class NNUNetTraining:
    """Plan, preprocess and train by nnU-Net, and write the weights with their plan for `NNUNetInferer`.

    nnU-Net finds its patch, spacing, network and normalization by itself, and has its own augmentation, loss and
    optimizer. Its folders lie in ``nnunet`` in the output folder, and what can be made again is deleted at the end. The
    state is saved after each epoch; a run that was interrupted goes on with the next epoch, drawing other patches than
    it would have.

    Args:
        datalist: see `mapseg_components.engines.nnunet_dataset.write_dataset`; `reading` and `labels` likewise.
        reading: from a case to scan and class indices.
        labels: structures and their values.
        output_dir: receives ``nnunet.pt``, ``nnunet.json`` and ``history.jsonl``.
        max_epochs: length of the training.
        epoch_length: iterations of an epoch; a fifth of them are validated.
        device: where it trains.
        flip_axes: spatial axes of a scan (0 to 2) along which scans are mirrored.
        num_workers: processes that augment, 0 for none but this one; the environment variables
            ``nnUNet_n_proc_DA`` and ``nnUNet_def_n_proc`` come first.

    Raises:
        ConfigError: nnU-Net is missing.

    Examples:
        >>> from mapseg_components.engines import NNUNetTraining
        >>> NNUNetTraining(
        ...     "datalist.json", reading, {"tumour": 1}, "runs/teacher", 200, 250
        ... ).run()  # doctest: +SKIP
    """

    def __init__(
        self,
        datalist: str | os.PathLike[str],
        reading: Callable[[dict[str, Any]], Mapping[str, Any]],
        labels: Mapping[str, int],
        output_dir: str | os.PathLike[str],
        max_epochs: int,
        epoch_length: int,
        device: torch.device | str = "cpu",
        flip_axes: Sequence[int] = (),
        num_workers: int = 0,
    ) -> None:
        require_nnunet()
        self.datalist = Path(datalist)
        self.reading = reading
        self.labels = labels
        self.output = Path(output_dir).absolute()
        self.max_epochs = max_epochs
        self.epoch_length = epoch_length
        self.device = torch.device(device)
        self.flip_axes = list(flip_axes)
        self.num_workers = num_workers

    def run(self) -> None:
        """Everything that is not done yet.

        Raises:
            DataError: a scan or label map cannot be read.
            NonFiniteError: the weights are not finite.
            ResourceError: the disk is full.
        """
        if (self.output / WEIGHTS).is_file():
            logger.info(f"{self.output / WEIGHTS} is there: nothing is left to train.")
        else:
            with ended_by_signals():
                self._plan()
                trainer = self._trainer()
                part("run.run_training", "maybe_load_checkpoint")(trainer, True, False)
                trainer.run_training()
                self._publish(trainer)
        self._clear()

    def _clear(self) -> None:
        """Delete what can be made again, copies of the scans; first of all what says that they are whole."""
        (self.folder / PREPARED).unlink(missing_ok=True)
        for name in ("raw", "preprocessed"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Of nnU-Net."""
        return self.output / "nnunet"

    def _plan(self) -> None:
        """Dataset, plan and preprocessing, by MONAI's runner, which tells nnU-Net its folders."""
        places = {f"nnunet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}
        prepared = self.folder / PREPARED
        if not prepared.is_file():
            self._clear()
            split = write_dataset(self.datalist, self.reading, self.labels, self.folder / "raw" / NAME)
        workers = max(self.num_workers, 1)
        augmenting = os.environ.get(AUGMENTING, str(self.num_workers))
        os.environ[AUGMENTING] = str(max(int(augmenting), 1))  # the planner takes its threads from it, and none fails
        os.environ.setdefault("nnUNet_def_n_proc", str(workers))
        runner = nnUNetV2Runner({**places, "dataset_name_or_id": NUMBER}, work_dir=str(self.folder))
        if not prepared.is_file():
            runner.plan_and_process(npfp=workers, verify_dataset_integrity=True, no_pp=True)
            write_json([split], self.folder / "preprocessed" / NAME / "splits_final.json")
            name = configuration_of(self._plans())
            runner.preprocess(c=(name,), n_proc=(workers,))
            write_json({"configuration": name}, prepared)
        os.environ[AUGMENTING] = augmenting

    def _plans(self) -> dict[str, Any]:
        return self._read("nnUNetPlans.json")

    def _read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "preprocessed" / NAME / name).read_text(encoding="utf-8"))

    def _trainer(self) -> Any:
        """nnU-Net's trainer of the planned length.

        MONAI's runner would start ``nnUNetv2_train``, which trains in lengths of its own on a GPU alone.
        """
        base, output = part("training.nnUNetTrainer.nnUNetTrainer", "nnUNetTrainer"), self.output
        flip_axes = self.flip_axes

        class Trainer(base):  # type: ignore[misc, valid-type]
            """nnU-Net's own, but for the axes of flips, checkpoints that are whole, and the history."""

            def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:  # noqa: N802
                *found, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
                dimensions = len(self.configuration_manager.patch_size)
                axes = mirrored_axes(flip_axes, self.plans_manager.transpose_forward, dimensions)
                self.inference_allowed_mirroring_axes = axes
                return *found, axes

            def save_checkpoint(self, filename: str) -> None:
                with replacing(filename) as temporary:
                    super().save_checkpoint(str(temporary))

            def on_epoch_end(self) -> None:
                super().on_epoch_end()
                columns = {name: self.logger.get_value(key, step=None) for name, key in HISTORY.items()}
                lines = [
                    {"epoch": number, **{name: float(value) for name, value in zip(columns, values)}}
                    for number, values in enumerate(zip(*columns.values()), start=1)
                ]
                write_text("".join(f"{json.dumps(line)}\n" for line in lines), output / "history.jsonl")

        plans = self._plans()
        name = configuration_of(plans)
        trainer = Trainer(plans | {"continue_training": True}, name, 0, self._read("dataset.json"), self.device)
        trainer.device = self.device  # the trainer takes the first GPU, whichever it is given
        trainer.num_epochs = self.max_epochs
        trainer.num_iterations_per_epoch = self.epoch_length
        trainer.num_val_iterations_per_epoch = max(self.epoch_length // 5, 1)
        trainer.save_every = 1
        return trainer

    def _publish(self, trainer: Any) -> None:
        """Weights in a file that holds nothing else, and the plan beside them."""
        weights = weights_of(getattr(trainer.network, "_orig_mod", trainer.network))
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise NonFiniteError(f"{self.output}: weights of nnU-Net are NaN or infinite: look at its log")
        plans = self._plans()
        content = {"plans": plans, "dataset": self._read("dataset.json"), "configuration": configuration_of(plans)}
        write_json(content, (self.output / WEIGHTS).with_suffix(PLANS))
        write_atomic(weights, self.output / WEIGHTS)


def configuration_of(plans: Mapping[str, Any]) -> str:
    """The configuration of nnU-Net that is trained: of volumes the one at full resolution, of single slices ``2d``."""
    return "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Context in which SIGTERM ends this process as Ctrl-C does, so that its workers end with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
