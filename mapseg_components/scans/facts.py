# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Facts of a file that no setting changes, and a record of them (``audit.json``), so that none is read twice."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mapseg_components.boxes import corner_distance
from mapseg_components.files import write_json
from mapseg_components.scans.headers import Remark
from mapseg_components.scans.nifti import Scan, read_nifti
from mapseg_components.structures import are_whole, to_whole

__all__ = ["AuditRecord", "Facts", "facts_of", "facts_of_scan", "looks_like_labels"]

logger = logging.getLogger(__name__)

FORMAT = 2  # of the record; raise it when a check below changes
MOST_VALUES = 1000  # distinct label values kept
DRAWN = 1 << 16  # voxels that are looked at before all of them are
ALIKE = 0.7  # share of equal neighbours in a label map
LARGEST = float(np.finfo(np.float32).max)  # MONAI reads scans as float32


@dataclass(frozen=True)
class Facts:
    """What was found in one scan or label map.

    Args:
        shape: voxels per axis.
        affine: (4, 4).
        has_orientation: the header names an sform or a qform; otherwise the affine is a guess.
        disagreement: mm between corners by sform and by qform, and degrees between their axes; ``None`` with one form.
        lowest: lowest finite voxel (0 without any).
        highest: highest finite voxel (0 without any).
        negative: number of voxels below 0.
        not_finite: number of voxels that are NaN, infinite or beyond float32, and the index of the first.
        first_not_finite: see above.
        digest: see `Scan`.
        values: of a label map, each value with its number of voxels, at most 1000; ``None`` for an image.
        more_values: distinct values left out of ``values``.
        label_like: of an image, it looks like a label map, see `looks_like_labels`.
        remarks: of the header, see `Geometry`.
    """

    shape: tuple[int, ...]
    affine: list[list[float]]
    has_orientation: bool
    disagreement: tuple[float, float] | None
    lowest: float
    highest: float
    negative: int
    not_finite: int
    first_not_finite: tuple[int, ...] | None
    digest: str
    values: list[tuple[float, int]] | None = None
    more_values: int = 0
    label_like: bool = False
    remarks: tuple[Remark, ...] = ()


def facts_of(path: str | Path, with_values: bool) -> Facts:
    """Read a file to its end and say what is in it.

    Args:
        path: see `read_nifti`, whose errors are passed on.
        with_values: count the values, for a label map.
    """
    return facts_of_scan(read_nifti(path), with_values)


def facts_of_scan(scan: Scan, with_values: bool) -> Facts:
    """Facts of a scan that was read; see `facts_of`."""
    voxels = scan.voxels
    lowest, highest = float(voxels.min()), float(voxels.max())
    finite, not_finite, first = voxels, 0, None
    if not (lowest >= -LARGEST and highest <= LARGEST):  # true for NaN as well
        with np.errstate(invalid="ignore"):
            good = np.abs(voxels) <= LARGEST
        not_finite, first = int(good.size - good.sum()), tuple(int(i) for i in np.argwhere(~good)[0])
        finite = voxels[good]
        lowest, highest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values, more = value_counts(finite) if with_values else (None, 0)
    return Facts(
        shape=scan.voxels.shape,
        affine=scan.affine.tolist(),
        has_orientation=scan.sform is not None or scan.qform is not None,
        disagreement=disagreement(scan),
        lowest=lowest,
        highest=highest,
        negative=int((voxels < 0).sum()) if lowest < 0 else 0,
        not_finite=not_finite,
        first_not_finite=first,
        digest=scan.digest,
        values=values,
        more_values=more,
        label_like=not with_values and not not_finite and looks_like_labels(voxels),
        remarks=scan.remarks,
    )


def looks_like_labels(voxels: np.ndarray) -> bool:
    """Whether voxels (X, Y, Z) are a label map by content: few whole numbers, and neighbours in a structure are equal.

    So are at least `ALIKE` of the pairs of neighbours that lie above the lowest value; in scans noise sees to fewer.
    """
    drawn = np.unique(voxels.ravel(order="K")[:: max(voxels.size // DRAWN, 1)])
    if len(drawn) > MOST_VALUES or not are_whole(drawn).all():
        return False
    above, equal, pairs = voxels > voxels.min(), 0, 0
    for axis in range(voxels.ndim):
        one, two = (np.moveaxis(above, axis, 0)[part] for part in (slice(1, None), slice(None, -1)))
        same = np.moveaxis(voxels, axis, 0)
        both = one & two
        pairs += int(both.sum())
        equal += int((both & (same[1:] == same[:-1])).sum())
    if equal < ALIKE * pairs:
        return False
    counts, more = value_counts(voxels)
    return not more and len(counts) > 1 and all(value.is_integer() for value, _ in counts)


def value_counts(voxels: np.ndarray) -> tuple[list[tuple[float, int]], int]:
    """Distinct values, by `to_whole`, with their counts, at most `MOST_VALUES`, and how many were left out."""
    if not voxels.size:
        return [], 0
    low, high = voxels.min(), voxels.max()
    if voxels.dtype.kind in "iu" and int(high) - int(low) < 1 << 16:  # many times faster than sorting
        counts = np.bincount((voxels.ravel().astype(np.int64)) - int(low))
        values = np.flatnonzero(counts)
        counts, values = counts[values], values + int(low)
    else:
        values, counts = np.unique(voxels, return_counts=True)
        values, where = np.unique(to_whole(values), return_inverse=True)
        counts = np.bincount(where, counts).astype(np.int64)
    listed = [(float(v), int(n)) for v, n in zip(values[:MOST_VALUES], counts[:MOST_VALUES])]
    return listed, max(len(values) - MOST_VALUES, 0)


def disagreement(scan: Scan) -> tuple[float, float] | None:
    """Largest distance of a corner in mm, and largest angle of an axis in degrees, between sform and qform."""
    if scan.sform is None or scan.qform is None:
        return None
    one, two = (form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0) for form in (scan.sform, scan.qform))
    cosine = float((one * two).sum(axis=0).clip(-1, 1).min())
    return corner_distance(scan.voxels.shape, scan.sform, scan.qform), float(np.degrees(np.arccos(cosine)))


class AuditRecord:
    """Facts of files, kept between runs in a JSON file; used again for a file of equal path, size and time of change.

    A file that could not be read is not kept, so it is read again. A record that is damaged, or of another version, is
    left aside and written anew.

    Args:
        path: the file, or ``None`` to keep nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.entries = {} if self.path is None else read_entries(self.path)
        self.reused = 0
        self._changed = False

    def facts(self, path: str | Path, with_values: bool) -> Facts:
        """Facts of a file, by the record or by `facts_of`, whose errors are passed on."""
        key, stamp = str(path), stamp_of(path)
        entry = self.entries.get(key)
        if entry is not None and stamp is not None and [entry.get("size"), entry.get("mtime_ns")] == stamp:
            known = facts_from(entry.get("facts"))
            if known is not None and (known.values is not None or not with_values):
                self.reused += 1
                return known
        if self.entries.pop(key, None) is not None:
            self._changed = True
        found = facts_of(path, with_values)
        if stamp is not None and stamp == stamp_of(path):
            self.entries[key] = {"size": stamp[0], "mtime_ns": stamp[1], "facts": asdict(found)}
            self._changed = True
        return found

    def save(self) -> None:
        """Write the record, whole or not at all.

        Raises:
            ResourceError: it cannot be written.
        """
        if self.path is None or not self._changed or int(os.environ.get("RANK", 0)) != 0:
            return  # of a distributed run, the first process writes
        write_json({"format": FORMAT, "files": self.entries}, self.path)
        self._changed = False


def stamp_of(path: str | Path) -> list[int] | None:
    """Size and time of change in ns, or ``None`` if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def read_entries(path: Path) -> dict[str, Any]:
    """Entries of a record; empty if there is none or it cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    files = content.get("files") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(files, dict):
        logger.warning(f"{path} is no record of this version's audit: all files are read again.")
        return {}
    return {key: entry for key, entry in files.items() if isinstance(entry, dict)}


def facts_from(content: Any) -> Facts | None:
    """Facts of a record's entry, or ``None`` if it is not what `AuditRecord` wrote."""
    if not isinstance(content, Mapping) or set(content) != {field.name for field in fields(Facts)}:
        return None
    try:
        values, first, forms = content["values"], content["first_not_finite"], content["disagreement"]
        x, y, z = (int(side) for side in content["shape"])
        return Facts(
            shape=(x, y, z),
            affine=np.array(content["affine"], dtype=float).reshape(4, 4).tolist(),
            has_orientation=bool(content["has_orientation"]),
            disagreement=None if forms is None else (float(forms[0]), float(forms[1])),
            lowest=float(content["lowest"]),
            highest=float(content["highest"]),
            negative=int(content["negative"]),
            not_finite=int(content["not_finite"]),
            first_not_finite=None if first is None else tuple(int(i) for i in first),
            digest=str(content["digest"]),
            values=None if values is None else [(float(value), int(count)) for value, count in values],
            more_values=int(content["more_values"]),
            label_like=bool(content["label_like"]),
            remarks=tuple((str(severity), str(what), str(remedy)) for severity, what, remedy in content["remarks"]),
        )
    except (TypeError, ValueError, LookupError, OverflowError):
        return None
