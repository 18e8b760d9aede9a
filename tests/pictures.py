# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Small PNG and TIFF images, and what Pillow does not write: colours of 16 bits, grey values of 2 bits."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by channels


def write_picture(path: Path, pixels, **options) -> str:
    """An image of pixels (rows, columns) or (rows, columns, channels), by Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)
    return str(path)


def write_png(path: Path, rows: bytes, size: tuple[int, int], bits: int, channels: int) -> str:
    """A PNG image of packed rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", *size, bits, COLOUR_TYPES[channels], 0, 0, 0)
    step = -(-size[0] * bits * channels // 8)
    packed = b"".join(b"\0" + rows[start : start + step] for start in range(0, len(rows), step))
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return str(path)


def write_deep_png(path: Path, pixels) -> str:
    """A PNG image of uint16 pixels (rows, columns, channels)."""
    rows, columns, channels = pixels.shape
    return write_png(path, pixels.astype(">u2").tobytes(), (columns, rows), 16, channels)


def write_tiff(path: Path, rows: bytes, size: tuple[int, int], bits: int, photometric: int = 1, kind: int = 1) -> str:
    """A TIFF image of packed rows, little endian; ``photometric`` 0: 0 is white; ``kind`` 2: signed numbers."""
    fields = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: size[1]}
    fields |= {279: len(rows), 339: kind}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in fields.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(rows))
    path.write_bytes(start + rows + struct.pack("<H", len(fields)) + entries + bytes(4))
    return str(path)


def cells(seed: int, shape=(40, 56), bright: bool = True):
    """Image of uint8, darkest tissue 0, and label map: rings with a core, in noise."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    label = np.zeros(shape, np.uint8)
    for row in range(8, shape[0], 16):
        for column in range(8, shape[1], 16):
            distance = np.hypot(rows - row, columns - column)
            label[distance < 7] = 1
            label[distance < 4] = 2
    level = np.array([0, 200, 100] if bright else [220, 20, 120])[label]
    return (level + 8 * generator.standard_normal(shape)).clip(0, 255).astype(np.uint8), label


def make_images(folder: Path) -> Path:
    """A datalist of images: three labelled, two of the other contrast, one of them with a mask and larger."""
    for number, name in enumerate(("a", "b", "c")):
        image, label = cells(number)
        write_picture(folder / "source" / "images" / f"{name}.png", image)
        write_picture(folder / "source" / "labels" / f"{name}.png", label)
    for number, name in enumerate(("t", "u")):
        image, _ = cells(10 + number, (44 + 8 * number, 60), bright=False)
        write_picture(folder / "target" / "images" / f"{name}.tif", image)
    write_picture(folder / "target" / "images" / "u_mask.png", np.pad(np.ones((52, 40), np.uint8), ((0, 0), (0, 20))))
    for name in ("images", "labels"):
        place = folder / "validation" / name
        place.mkdir(parents=True)
        (folder / "source" / name / "c.png").rename(place / "c.png")
    (folder / "datalist.json").write_text('{"labels": {"ring": 1, "core": 2}}')
    return folder
