# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""PNG and TIFF images as scans of one slice: grey or colour, 8 or 16 bits, with a pixel size where one is known.

Pillow decodes them, from an opened file and with a check of its end; MONAI's ``PILReader`` would open any format that
Pillow knows, JPEG as well, and gives no pixel size. Colours of 16 bits, of which Pillow drops 8, are decoded by ITK.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from monai.utils import optional_import

from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.memory import require_memory
from mapseg_components.scans.files import COPY_AGAIN, Scan, opened, stem
from mapseg_components.scans.findings import fault
from mapseg_components.scans.headers import Geometry, Remark
from mapseg_components.scans.pixel_size import Resolution, pixel_size_of, resolution_of

__all__ = [
    "LOSSY",
    "RGB_RULES",
    "Picture",
    "has_pixel_size",
    "in_mm",
    "picture_geometry",
    "picture_outside",
    "read_picture",
]

KIND = "an image"
UM_IN_MM = 1000.0
RGB_RULES = ("luminance", "red", "green", "blue", "mean")
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and MONAI have it
LOSSY = "it is compressed as JPEG, which changes values"
PALETTE = "it has a palette: the indices of the colours are its values"
SAVE_GREY = "save it as grey values or RGB, 8 or 16 bits, in PNG or TIFF"
ONE_PAGE = "save each page as a file, or a volume as NIfTI"
# tags of TIFF
SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION, ORIENTATION, PLANAR = 254, 258, 259, 262, 270, 274, 284
SAMPLES = 339
JPEG = (6, 7, 34892, 33007)  # compressions that change values
IMAGEJ_STACK = re.compile(r"^images=(\d+)$", re.MULTILINE)
REDUCED = 1  # bit of SUBFILE: a page that is a smaller copy of another, of a pyramid
MODES = {"1", "L", "P", "PA", "LA", "I", "F", "RGB", "RGBA", "RGBX", "YCbCr"}  # of Pillow, beside I;16 and the like
SMALL_GREYS = {"L;2": 85, "L;4": 17}  # what Pillow multiplies stored values of 2 and 4 bits by


@dataclass(frozen=True)
class Header:
    """What a header says.

    Args:
        shape: columns and rows.
        deep: colours of 16 bits, which ITK decodes.
        channels: with alpha, if there is one.
        sides: of a pixel in mm, along a row and along a column; ``None`` if unknown.
        remarks: see `Geometry`.
        clear: pixels may be transparent.
    """

    shape: tuple[int, int]
    deep: bool
    channels: int
    sides: tuple[float, float] | None
    remarks: tuple[Remark, ...]
    clear: bool = False


@dataclass(frozen=True)
class Picture(Scan):
    """An image as read.

    Args:
        outside: (X, Y, 1), where it is fully transparent; ``None`` without.
        sized: its pixel size is known, else lengths are in pixels.
    """

    outside: np.ndarray | None = None
    sized: bool = True


def read_picture(path: str | Path, rgb: str = "luminance") -> Picture:
    """Read a PNG or TIFF image to its end.

    X runs along a row to the right, Y along a column downwards, as ITK has it: the affine's axes point to the left and
    to the back, so that a view from below shows the image as it is. A slice is as thick as a pixel is wide.

    Lengths of the affine are micrometres, where those of volumes are mm, and pixels where no pixel size is known:
    MONAI takes affines for equal that differ by less than 0.001, and two pixel sizes of a microscope do in mm.

    Grey values and indices of a palette stay as they are stored; 1 bit is 0 and 1. Colours become one channel by a
    rule, unless all three are equal. Fully transparent pixels are 0 and ``outside``.

    Args:
        path: the file.
        rgb: rule for colours, one of `RGB_RULES`; ``"luminance"`` is 0.299 R + 0.587 G + 0.114 B.

    Raises:
        ConfigError: the rule is unknown.
        DataError: no such file, no permission, another format (JPEG as well), damaged, several pages, or no grey values
            or RGB, such as CMYK.
        ResourceError: the image does not fit into memory.
    """
    check_rule(rgb)
    path = Path(path)
    with opened(path, KIND) as stream:
        image, header = parse(path, stream)
        columns, rows = header.shape
        needed = columns * rows * (header.channels * (12 if header.deep else 4) + 8)
        require_memory(needed, "cpu", f"{path}: {columns} x {rows} pixels", "crop the image, or use a larger machine")
        raw, alpha = pixels_of(path, image, header)
    digest = hashlib.sha256(f"{raw.shape} {raw.dtype.str} {rgb}".encode())
    digest.update(np.ascontiguousarray(raw))
    grey = raw if raw.ndim == 2 else one_channel(raw, rgb)
    outside = None if alpha is None or alpha.all() else volume_of(~alpha)
    voxels = volume_of(grey)
    if outside is not None:
        voxels = np.where(outside, 0, voxels).astype(voxels.dtype)
        digest.update(outside)
    geometry = geometry_from(header)
    return Picture(
        voxels,
        geometry.affine,
        geometry.sform,
        None,
        digest.hexdigest(),
        geometry.remarks,
        outside,
        header.sides is not None,
    )


def picture_geometry(path: str | Path) -> Geometry:
    """Shape (columns, rows, 1) and affine of an image, by its header alone. Errors as `read_picture`, of the header."""
    path = Path(path)
    with opened(path, KIND) as stream:
        return geometry_from(parse(path, stream)[1])


def has_pixel_size(path: str | Path) -> bool:
    """Whether the pixel size of an image is known, by its header or a file beside it. Errors as `picture_geometry`."""
    path = Path(path)
    with opened(path, KIND) as stream:
        return parse(path, stream)[1].sides is not None


def picture_outside(path: str | Path) -> np.ndarray | None:
    """Where an image is fully transparent, bool (X, Y, 1); ``None`` if it is nowhere. Errors as `read_picture`."""
    path = Path(path)
    with opened(path, KIND) as stream:
        clear = parse(path, stream)[1].clear
    return read_picture(path).outside if clear else None


def check_rule(rgb: str) -> None:
    """Refuse an unknown rule for colours. Raises `ConfigError`."""
    if rgb not in RGB_RULES:
        raise ConfigError(f"rgb is {rgb!r}, expected one of {', '.join(RGB_RULES)}")


def one_channel(colours: np.ndarray, rgb: str) -> np.ndarray:
    """Colours (rows, columns, 3) as one channel by a rule; equal channels stay what they are, in their type."""
    if rgb in ("red", "green", "blue"):
        return colours[..., ("red", "green", "blue").index(rgb)]
    if (colours == colours[..., :1]).all():
        return colours[..., 0]
    weights = LUMINANCE if rgb == "luminance" else (1 / 3, 1 / 3, 1 / 3)
    return sum(np.float32(weight) * colours[..., number] for number, weight in enumerate(weights))  # type: ignore[return-value]


def volume_of(pixels: np.ndarray) -> np.ndarray:
    """(X, Y, 1) of pixels (rows, columns)."""
    return np.ascontiguousarray(pixels.T)[..., None]


def geometry_from(header: Header) -> Geometry:
    """See `read_picture`."""
    across, down = (side * UM_IN_MM for side in header.sides) if header.sides else (1.0, 1.0)
    affine = np.diag([-across, -down, math.sqrt(across * down), 1.0])
    return Geometry((*header.shape, 1), affine, affine, None, header.remarks)


def in_mm(affine: np.ndarray, path: str | Path) -> np.ndarray:
    """Affine (4, 4) in mm of an image's, for a volume on its grid; of one without a pixel size as it is."""
    result = np.array(affine, dtype=float)
    if has_pixel_size(path):
        result[:3] /= UM_IN_MM
    return result


def parse(path: Path, stream: BinaryIO) -> tuple[Any, Header]:
    """Pillow's image, not decoded yet, and its header. Raises `DataError`."""
    plugin = "PngImagePlugin" if path.suffix.lower() == ".png" else "TiffImagePlugin"
    name = "PngImageFile" if path.suffix.lower() == ".png" else "TiffImageFile"
    reader, _ = optional_import(f"PIL.{plugin}", name=name)
    start = stream.read(8)
    stream.seek(0)
    if not start:
        raise damaged(path, "the file is empty")
    if start[:3] == b"\xff\xd8\xff":
        raise fault(path, "is a JPEG image by its content", "save it as PNG or TIFF from its origin: JPEG loses values")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags, which mean nothing here
            if plugin == "PngImagePlugin":
                reader(stream).verify()  # checksums, which decoding leaves out
                stream.seek(0)
            image = reader(stream)  # not Image.open, which tries all formats
            header = png_header(path, image) if plugin == "PngImagePlugin" else tiff_header(path, image)
    except (MAPSegError, MemoryError):
        raise
    except Exception as error:  # Pillow fails in many ways on a damaged file, and none may escape without a name
        if "pixel mode" in str(error):
            raise fault(path, "its pixels are of a kind that is not read", SAVE_GREY) from error
        raise damaged(path, reason_of(error)) from error
    return image, header


def reason_of(error: BaseException) -> str:
    """First line of an error, or its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def damaged(path: Path, reason: str) -> Exception:
    """Error of a file that cannot be read as what it is named."""
    return fault(path, f"cannot be read as {KIND} ({reason})", COPY_AGAIN)


def png_header(path: Path, image: Any) -> Header:
    """Header of a PNG image. Raises `DataError`."""
    if getattr(image, "n_frames", 1) > 1:
        raise fault(path, f"{image.n_frames} pictures in one file (animated), expected one", ONE_PAGE)
    deep = str(image.tile[0][3]).endswith(";16B") and image.mode in ("RGB", "RGBA")
    channels = 2 if str(image.tile[0][3]).startswith("LA") else len(image.getbands())
    dots = image.info.get("dpi")
    found = None if dots is None else Resolution(dots[0] / 25.4, dots[1] / 25.4)
    return header_of(path, image, channels, deep, found, ())


def tiff_header(path: Path, image: Any) -> Header:
    """Header of a TIFF image. Raises `DataError`."""
    pages = getattr(image, "n_frames", 1)
    whole = 0
    for page in range(pages):
        image.seek(page)
        whole += not int(image.tag_v2.get(SUBFILE, 0)) & REDUCED
    image.seek(0)
    tags = image.tag_v2
    if whole > 1:
        raise fault(path, f"{whole} pages in one file, expected one", ONE_PAGE)
    if int(tags.get(ORIENTATION, 1)) != 1:
        what = f"its orientation tag is {tags[ORIENTATION]}: viewers turn it, other programs do not"
        raise fault(path, what, "save it upright (orientation 1), its label map as well")
    deep = max(tags.get(BITS, (8,))) > 8 and image.mode in ("RGB", "RGBA", "RGBX")
    if deep and int(tags.get(PLANAR, 1)) == 2:
        raise fault(path, "colours of 16 bits in separate planes", "save it with interleaved colours, or as PNG")
    remarks: list[Remark] = []
    if tags.get(COMPRESSION) in JPEG:
        remarks.append(("note", LOSSY, "use it for scans alone, never for label maps"))
    description = str(tags.get(DESCRIPTION, ""))
    stack = IMAGEJ_STACK.search(description) if description.startswith("ImageJ=") else None
    if stack is not None and int(stack[1]) > 1:
        raise fault(path, f"a stack of {stack[1]} images (ImageJ), expected one", ONE_PAGE)
    return header_of(path, image, len(image.getbands()), deep, resolution_of(tags, description), tuple(remarks))


def header_of(
    path: Path, image: Any, channels: int, deep: bool, resolution: Resolution | None, remarks: tuple[Remark, ...]
) -> Header:
    """Header of an image of either format. Raises `DataError`."""
    if image.mode not in MODES and not image.mode.startswith("I;16"):
        raise fault(path, f"its colours are {image.mode}, expected grey values or RGB", SAVE_GREY)
    if image.mode in ("P", "PA"):
        remarks = (*remarks, ("note", PALETTE, "right for label maps; save a scan as grey values"))
    sides, more = pixel_size_of(path, stem(path), resolution)
    clear = "A" in image.getbands() or image.info.get("transparency") is not None
    return Header(tuple(image.size), deep, channels, sides, (*remarks, *more), clear)


def as_stored(pixels: np.ndarray, image: Any) -> np.ndarray:
    """Grey values of an image of 8 bits or less as they lie in the file: of TIFF, Pillow turns those round whose 0 is
    white, and reads those with a sign without it."""
    tags = getattr(image, "tag_v2", {})
    if image.mode in ("1", "L") and tags.get(PHOTOMETRIC) == 0:
        pixels = ~pixels
    return pixels.view(np.int8) if image.mode == "L" and tags.get(SAMPLES, (1,))[0] == 2 else pixels


def pixels_of(path: Path, image: Any, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey values (rows, columns) or colours (rows, columns, 3), and where they are not fully transparent.

    Raises:
        DataError: damaged.
    """
    if header.deep:
        return deep_colours(path, header)
    packing = image.tile[0][3] if image.tile else ""  # of TIFF with more than its name
    step = SMALL_GREYS.get((packing if isinstance(packing, str) else packing[0])[:3], 1)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # see `parse`
        raise damaged(path, reason_of(error)) from error
    clear = image.info.get("transparency")
    if image.mode == "I" and getattr(image, "tag_v2", {}).get(SAMPLES, (1,))[0] == 1:
        return np.asarray(image).view(np.uint32), None  # Pillow has signed numbers alone
    if image.mode == "YCbCr":
        image = image.convert("RGB")
    found = as_stored(np.asarray(image), image)
    if image.mode == "1":
        return found.astype(np.uint8), None
    if image.mode in ("LA", "PA"):
        return found[..., 0], found[..., 1] > 0
    if image.mode == "RGBA":
        return found[..., :3], found[..., 3] > 0
    if image.mode == "RGBX":
        return found[..., :3], None
    if image.mode == "P" and isinstance(clear, (bytes, int)):
        table = np.full(256, 255)
        table[: len(clear)] = list(clear) if isinstance(clear, bytes) else 255
        if isinstance(clear, int):
            table[clear] = 0
        return found, table[found] > 0
    alpha = None
    if (clear is not None and image.mode in ("L", "RGB")) or (clear is not None and image.mode.startswith("I;16")):
        alpha = found != clear if found.ndim == 2 else (found != np.asarray(clear)).any(axis=-1)
    return (found // step if step > 1 else found), alpha


def deep_colours(path: Path, header: Header) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours of 16 bits, and alpha, by ITK. Raises `DataError`."""
    itk, _ = optional_import("itk")
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"image{path.suffix.lower()}")  # ITK takes UTF-8, whatever bytes a name has
        link.symlink_to(path.absolute())
        try:
            colours = itk.imread(str(link), pixel_type=itk.Vector[itk.F, header.channels])
            found = np.asarray(itk.array_from_image(colours))
        except (RuntimeError, TypeError) as error:
            raise damaged(path, "its colours cannot be decoded") from error
    found = found.astype(np.uint16)
    if header.channels == 2:
        return found[..., 0], found[..., 1] > 0
    return found[..., :3], found[..., 3] > 0 if header.channels == 4 else None
