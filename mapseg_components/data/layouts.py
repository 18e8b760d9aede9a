# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans and label maps by folder and name, in the layouts of nnU-Net, the Medical Segmentation Decathlon and BIDS.

::

    images/a.nii.gz             labels/a.nii.gz
    imagesTr/a_0000.nii.gz      labelsTr/a.nii.gz       (nnU-Net; one file per channel)
    imagesTr/a.nii.gz           labelsTr/a.nii.gz       (Decathlon)
    sub-1/anat/sub-1_T1w.nii.gz sub-1/anat/sub-1_dseg.nii.gz
    a.nii.gz                    a_seg.nii.gz

PNG and TIFF images are laid out alike; there ``a_mask`` beside ``a`` is a mask, 0 where the image does not count.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mapseg_components.scans.files import is_picture, scans_among
from mapseg_components.scans.files import stem as stem_of
from mapseg_components.scans.masks import MASK

__all__ = [
    "DATASET",
    "case_name",
    "channels_of",
    "dataset_content",
    "image_folders",
    "images_beside",
    "label_of",
    "labels_among",
    "labels_beside",
    "labels_of_scans",
    "listing_of",
    "masks_among",
    "misplaced",
    "scans_of_label",
    "says_label_map",
    "stems_of",
]

DATASET = "dataset.json"
FOLDER = re.compile(r"(images|labels)(tr|ts|te|val|)", re.IGNORECASE)
CHANNEL = re.compile(r"(.+)_(\d{4})")
ENDING = re.compile(
    r"(.+?)[_-](dseg|seg|segm|segmentation|labels?|labelmap|mask|msk|gt|probseg|annotation)", re.IGNORECASE
)
BEGINNING = re.compile(r"(?:seg|segmentation|labels?|labelmap|mask|gt)[_-](.+)", re.IGNORECASE)
BIDS_RESULT = re.compile(r"sub-\w.*_(dseg|probseg|mask)|sub-\w.*_label-.+")
ENTITY = re.compile(r"_(desc|label|res|den)-[^_]+")  # of a label map and not of its scan
BIDS_SUFFIX = re.compile(r"_(dseg|probseg|mask|seg|roi|dlabel)$")
LABELS_REMEDY = (
    "put label maps into labels beside images, under their scans' names, or take them out; rename it if it is a scan"
)
SETTLED_NS = 3 * 10**9  # since a folder changed last
ONE_CHANNEL = "the network takes one image of one channel: keep the files of one channel in a separate folder"


class Listing(NamedTuple):
    """Files of a folder.

    Args:
        scans: names of scans, see `scans_among`; hidden ones are none.
        masks: those of masks of images among them.
        stems: the others by name without ending.
        channels: names of files by the case that they may be channels of, see `channels_of`.
    """

    scans: frozenset[str]
    masks: set[str]
    stems: dict[str, Path]
    channels: dict[str, list[str]]


def listing_of(folder: Path) -> Listing:
    """Files of a folder; none of one that cannot be listed. A folder that is asked for once for each of its files is
    listed once, unless it has changed in between."""
    try:
        changed = os.stat(folder).st_mtime_ns
        # clocks of file systems are coarse: what has changed just now may change again at the same time
        return kept_listing(folder, changed) if time.time_ns() - changed > SETTLED_NS else made_listing(folder)
    except OSError:
        return Listing(frozenset(), set(), {}, {})


def made_listing(folder: Path) -> Listing:
    """Files of a folder, listed now. Raises `OSError`."""
    names = scans_among(sorted(os.listdir(folder)))
    masks = masks_among(names)
    stems = {stem_of(Path(name)): folder / name for name in names if name not in masks}
    channels: dict[str, list[str]] = {}
    for stem, file in stems.items():
        if CHANNEL.fullmatch(stem):
            channels.setdefault(case_name(stem), []).append(file.name)
    return Listing(frozenset(names), masks, stems, channels)


@functools.lru_cache(maxsize=8)
def kept_listing(folder: Path, changed: int) -> Listing:
    """Files of a folder as it was when it changed last. Raises `OSError`."""
    return made_listing(folder)


def stems_of(folder: Path) -> dict[str, Path]:
    """Scans of a folder by name without ending, see `scans_among`; hidden ones, masks of images, and what cannot be
    listed, are left out."""
    return listing_of(folder).stems


def masks_among(names: Sequence[str]) -> set[str]:
    """Of the names of PNG and TIFF images those of masks: ``CASE_mask`` beside ``CASE``. Of NIfTI files none is."""
    stems = {stem_of(Path(name)) for name in names}
    masks = (name for name in names if is_picture(name) and stem_of(Path(name)).endswith(MASK))
    return {name for name in masks if stem_of(Path(name)).removesuffix(MASK) in stems}


def labels_beside(folder: Path) -> Path | None:
    """``labelsTr`` beside a folder ``imagesTr``, and so on; ``None`` without."""
    return beside(folder, "images", "labels")


def images_beside(folder: Path) -> Path | None:
    """``imagesTr`` beside a folder ``labelsTr``, and so on; ``None`` without."""
    return beside(folder, "labels", "images")


def beside(folder: Path, own: str, other: str) -> Path | None:
    """The folder of the same ending beside another one."""
    folder = folder.absolute()
    match = FOLDER.fullmatch(folder.name)
    if match is None or match[1].casefold() != own:
        return None
    return child(folder.parent, other + match[2].casefold())


def child(folder: Path, name: str) -> Path | None:
    """A sub-folder by its name in any capitals."""
    try:
        return next((folder / each for each in sorted(os.listdir(folder)) if each.casefold() == name), None)
    except OSError:
        return None


def image_folders(folder: Path) -> list[Path]:
    """Sub-folders ``images``, ``imagesTr``, ``imagesVal``, ``imagesTs`` that there are."""
    found = (child(folder, f"images{ending}") for ending in ("", "tr", "val", "ts", "te"))
    return [one for one in found if one is not None and one.is_dir()]


def case_name(stem: str) -> str:
    """Name of a case: that of an image without nnU-Net's number of the channel."""
    match = CHANNEL.fullmatch(stem)
    return stem if match is None else match[1]


def label_of(stem: str, labels: Mapping[str, Path]) -> Path | None:
    """Label map of an image among those of a folder, by `stems_of`: of the same name, else of the case's."""
    return labels.get(stem, labels.get(case_name(stem)))


def labels_of_scans(scans: Sequence[Path], labels: Sequence[Path]) -> dict[Path, Path]:
    """Scan to label map, for the files of two folders; scans without one are absent."""
    maps = {stem_of(path): path for path in labels}
    found = ((scan, label_of(stem_of(scan), maps)) for scan in scans)
    return {scan: label for scan, label in found if label is not None}


def labels_among(files: Sequence[Path]) -> dict[Path, Path]:
    """Scan to the label map named after it in the same folder, where one scan and one label map belong together."""
    stems = {stem_of(path): path for path in files}
    found: dict[str, list[str]] = {}
    for stem in stems:
        scans = (scans_of_label(stem, list(stems)) or []) if named_as_label(stem) else []
        if len(scans) == 1:
            found.setdefault(scans[0], []).append(stem)
    return {stems[scan]: stems[labels[0]] for scan, labels in found.items() if len(labels) == 1}


def channels_of(path: Path) -> list[str]:
    """Names of the files of an image's case, if it has several channels in nnU-Net's way; else empty.

    ``a_0000`` and ``a_0001`` are two channels of ``a`` if the label map is named ``a``; without label maps, in folders
    named ``imagesTs`` and the like, unless ``dataset.json`` says that there is one channel.
    """
    folder = path.absolute().parent
    stem = stem_of(path)
    match, kind = CHANNEL.fullmatch(stem), FOLDER.fullmatch(folder.name)
    if match is None or kind is None or kind[1].casefold() != "images":
        return []
    beside = labels_beside(folder)
    labels = {} if beside is None else stems_of(beside)
    found = listing_of(folder)
    channels = found.channels.get(match[1], [])
    if stem in labels or len(channels) < 2:
        return []
    first = f"{match[1]}_0000" in found.stems  # else it is the number of one of many scans
    numbered = not kind[2] or not first or declared_channels(folder.parent) == 1
    return channels if match[1] in labels or not numbered else []


def declared_channels(folder: Path) -> int | None:
    """Number of channels by a ``dataset.json``; ``None`` if it does not say."""
    content = read_dataset(folder / DATASET)
    named = content.get("channel_names", content.get("modality"))
    return len(named) if isinstance(named, dict) else None


def read_dataset(path: Path) -> dict[str, Any]:
    """Content of a ``dataset.json``, empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def says_label_map(stem: str) -> bool:
    """Whether a name is that of a BIDS segmentation, mask or label."""
    return BIDS_RESULT.fullmatch(stem) is not None


def scans_of_label(stem: str, stems: Sequence[str]) -> list[str] | None:
    """Scans that a label map may be of, by their names in the same folder; ``None`` if its name is no label map's.

    A BIDS name says so by itself, others (``a_seg``, ``a_gt``, ``segmentation-1``) beside their scan only (``a``,
    ``a_t1``, ``volume-1``).

    Args:
        stem: a file's name without ending.
        stems: those of all files of its folder.
    """
    scans = [other for other in stems if other != stem and not named_as_label(other)]
    if says_label_map(stem):
        base = BIDS_SUFFIX.sub("", ENTITY.sub("", stem))
        return [other for other in scans if other == base or other.startswith(f"{base}_")]
    ending, beginning = ENDING.fullmatch(stem), BEGINNING.fullmatch(stem)
    found: list[str] = []
    if ending is not None:
        found = [other for other in scans if re.fullmatch(rf"{re.escape(ending[1])}([_-].+)?", other)]
    elif beginning is not None:
        found = [other for other in scans if re.fullmatch(rf"(.*[a-z][_-])?{re.escape(beginning[1])}", other, re.I)]
    return found or None


@functools.lru_cache(maxsize=1 << 16)
def named_as_label(stem: str) -> bool:
    """Whether a name may be a label map's, if its scan lies beside it."""
    return any(pattern.fullmatch(stem) for pattern in (BIDS_RESULT, ENDING, BEGINNING))


def misplaced(path: str | Path) -> tuple[str, str] | None:
    """Why a file cannot be segmented as a scan, by its place and name alone, and the remedy; ``None`` if it can."""
    path = Path(path).absolute()
    images = images_beside(path.parent)
    if images is not None:
        return f"lies in the folder of label maps of {images.name}", f"name {images} instead"
    stem = stem_of(path)
    if named_as_label(stem):
        scans = scans_of_label(stem, list(stems_of(path.parent)))
        if scans is not None:
            what = f"by its name a label map{f' beside its scan {scans[0]}' if scans else ''}"
            return what, LABELS_REMEDY
    channels = channels_of(path) if CHANNEL.fullmatch(stem) else []
    if channels:
        return f"one of {len(channels)} channels of a scan ({', '.join(channels[:4])})", ONE_CHANNEL
    return None


def dataset_content(folder: Path) -> dict[str, list[dict[str, str]]] | None:
    """Scans and label maps of a folder in nnU-Net's or the Decathlon's layout, as sections of a datalist.

    ``imagesTr`` (or ``images``) is ``source_training``, ``imagesVal`` ``source_validation``; the rest is not read. What
    has no partner is an entry without it. ``None`` for another folder.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for section, endings in (("source_training", ("tr", "")), ("source_validation", ("val",))):
        for ending in endings:
            images, labels = child(folder, f"images{ending}"), child(folder, f"labels{ending}")
            if images is not None and labels is not None and section not in found:
                found[section] = pairs(images, labels)
    return found if "source_training" in found else None


def pairs(images: Path, labels: Path) -> list[dict[str, str]]:
    """Entries of two folders; of several channels the first."""
    scans, maps = stems_of(images), stems_of(labels)
    entries: list[dict[str, str]] = []
    used: set[Path] = set()
    for stem, scan in scans.items():
        label = label_of(stem, maps)
        if label is not None and label in used:
            continue  # another channel: the first is refused by name
        entry = {"image": str(scan.absolute())}
        if label is not None:
            used.add(label)
            entry |= {"label": str(label.absolute()), "case_id": case_name(stem) if stem not in maps else stem}
        entries.append(entry)
    return entries + [{"label": str(one.absolute())} for one in maps.values() if one not in used]


def decathlon_content(content: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """A ``dataset.json`` as sections of a datalist: its list ``training``, else the folders beside it; else ``None``.

    Args:
        content: of the file.
        folder: where it lies.
    """
    listed = {key: content.get(key) for key in ("training", "validation")}
    found = dataset_content(folder) or {}
    for section, key in (("source_training", "training"), ("source_validation", "validation")):
        if isinstance(listed[key], list) and listed[key] and (key == "training" or found):
            found[section] = [with_channel(entry, folder) for entry in listed[key]]
    return {**content, **found} if found else None


def with_channel(entry: Any, folder: Path) -> Any:
    """An entry of a list, whose scan nnU-Net names without ``_0000``, the channel that its file has."""
    image = entry.get("image") if isinstance(entry, Mapping) else None
    if not isinstance(image, str) or (folder / image).exists():
        return entry
    for ending in (".nii.gz", ".nii"):
        first = f"{image.removesuffix(ending)}_0000{ending}"
        if image.endswith(ending) and (folder / first).is_file():
            return {"case_id": Path(image).name.removesuffix(ending), **entry, "image": first}
    return entry
