#!/usr/bin/env python3
# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Pack a bundle for release: python tools/pack_bundle.py bundles/NAME --output DIR.

Writes ``NAME_v<version>.zip`` and beside it ``NAME_v<version>.zip.sha256``. The zip holds one folder ``NAME`` with the
bundle's configs, docs, licence and ``models/model.pt``, and a copy of ``mapseg_components``, so that the unpacked
bundle runs where the package is not installed; JSON configs are in the Model Zoo's layout, an item on each line.
Nothing else in the bundle's folder is packed: no results, no resume files, no caches. The same files give the same
bytes on every machine: sorted, stored, without times and owners.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zipfile
from pathlib import Path

from mapseg_components.errors import ConfigError, MAPSegError
from mapseg_components.files import replacing, write_text

PACKAGE = Path(__file__).resolve().parents[1] / "mapseg_components"
REQUIRED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
FOLDERS = ("configs", "docs")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name


def contents(bundle: Path, package: Path = PACKAGE) -> dict[str, Path]:
    """Files of a release, by their names in the bundle, sorted.

    Args:
        bundle: the bundle's folder.
        package: the folder of ``mapseg_components``.

    Raises:
        ConfigError: a file that every release needs is not there.
    """
    missing = [name for name in REQUIRED if not (bundle / name).is_file()]
    if missing:
        raise ConfigError(f"{bundle} has no {', '.join(missing)}: a release needs {', '.join(REQUIRED)}")
    files = {name: bundle / name for name in REQUIRED}
    for folder in FOLDERS:
        files |= {path.relative_to(bundle).as_posix(): path for path in (bundle / folder).rglob("*")}
    files |= {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*")}
    return {name: files[name] for name in sorted(files) if belongs(name) and files[name].is_file()}


def released(name: str, path: Path) -> bytes:
    """Content of a file in the release: of a JSON config in the layout that the Model Zoo asks for."""
    if path.suffix == ".json" and name.startswith("configs/"):
        return (json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=4) + "\n").encode()
    return path.read_bytes()


def belongs(name: str) -> bool:
    """Whether a file is part of a release: no cache, no hidden file."""
    return not any(part == "__pycache__" or part.startswith(".") for part in name.split("/"))


def pack(bundle: Path, output: Path, package: Path = PACKAGE) -> Path:
    """Write the zip and its checksum file; returns the zip.

    Raises:
        ConfigError: see `contents`.
        ResourceError: the folder cannot be written.
    """
    files = contents(bundle, package)
    version = json.loads((bundle / "configs" / "metadata.json").read_text())["version"]
    archive = output / f"{bundle.name}_v{version}.zip"
    with replacing(archive) as temporary:
        with zipfile.ZipFile(temporary, "w") as release:
            for name, path in files.items():
                entry = zipfile.ZipInfo(f"{bundle.name}/{name}", EPOCH)
                entry.create_system, entry.external_attr = 3, 0o100644 << 16  # a plain file, on every system
                release.writestr(entry, released(name, path))
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    write_text(f"{digest}  {archive.name}\n", archive.with_name(archive.name + ".sha256"))
    return archive


def main() -> None:
    """Pack the bundle that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder for the zip, default dist")
    arguments = parser.parse_args()
    try:
        archive = pack(arguments.bundle.resolve(), arguments.output)
    except MAPSegError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
    print(archive)


if __name__ == "__main__":
    main()
