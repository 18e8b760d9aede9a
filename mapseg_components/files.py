# Copyright (c) MAPSeg for MONAI contributors
# SPDX-License-Identifier: Apache-2.0
"""Writing so that nothing is lost: whole files or none, verified, and one run per folder.

A process that is killed at any moment, or a disk that fills up, leaves the old content of a file in place. What an
interrupted write leaves beside it (``.<name>.<random>.tmp``) is swept by the next run in that folder.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mapseg_components.errors import ConfigError, ResourceError

__all__ = [
    "as_written",
    "free_space_error",
    "lock_folder",
    "readable",
    "replacing",
    "require_writable",
    "set_aside",
    "sha256_of",
    "sweep_temporaries",
    "unlock_folders",
    "write_json",
    "write_text",
]

logger = logging.getLogger(__name__)

UNREADABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, lone surrogates and line separators
LOCK_NAME = ".run.lock"
TEMPORARY_SUFFIX = ".tmp"
# what `replacing` names its files: a hidden name, eight random characters, the suffix
TEMPORARY = re.compile(r"\..*\.[a-z0-9_]{8}\.tmp(\.[\w.]+)?")
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_locks: dict[Path, list[Any]] = {}  # lock, process, claims


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], keep_previous: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Context that yields a temporary path to write; at its end the file is flushed to disk and renamed over ``path``.

    Verify the temporary file inside the context: whatever raises there leaves ``path`` as it was.

    Args:
        path: the file; missing folders are made. A symbolic link is replaced, never followed.
        keep_previous: keep the file's old content under this name. Both names exist at every moment.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    ending = "".join(path.suffixes[-2:]) if path.name.endswith(".gz") else path.suffix  # writers choose by it
    # not longer than the name that the file system must take anyway; known before the file is there, so that a signal
    # at any moment leaves nothing behind
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}{ending}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        flush(temporary)
        temporary.chmod(0o666 & ~umask())
        if keep_previous is not None and path.is_file():
            link = temporary.with_name(temporary.name + ".previous")
            with contextlib.suppress(OSError):  # a file system without links keeps no previous file
                os.link(path, link)
                os.replace(link, keep_previous)
            link.unlink(missing_ok=True)  # still there if both names were already one file
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise free_space_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that could not be made
            temporary.unlink(missing_ok=True)


def free_space_error(path: Path, error: BaseException) -> ResourceError:
    """What to say when a file cannot be written; the old one is untouched."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    space = ""
    with contextlib.suppress(OSError):
        status = os.statvfs(path.parent)
        space = f", {status.f_bavail * status.f_frsize / 2**20:.0f} MiB free on its disk"
    full = getattr(error, "errno", None) in NO_SPACE or not isinstance(error, OSError)
    remedy = "free space, or choose another folder" if full else "choose a folder that you may write to"
    return ResourceError(f"cannot write {path} ({reason}{space}); what was there before is untouched: {remedy}")


def set_aside(paths: Iterable[Path]) -> list[Path]:
    """Rename files, those that are there, to ``<name>.earlier``, so that none is taken for a new run's.

    Returns:
        their former paths.
    """
    found = [path for path in paths if path.is_file()]
    for path in found:
        path.replace(path.with_name(f"{path.name}.earlier"))
    return found


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Checksum of a file's content, hexadecimal. Raises `OSError`."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def umask() -> int:
    """Permissions that this process withholds from new files; Python can only read it by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Have the operating system write a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or path.is_file():  # some file systems do not flush folders
            raise
    finally:
        os.close(descriptor)


def readable(text: str | os.PathLike[str]) -> str:
    """A file name as text on one line: bytes that are no text, line breaks and other control characters as escapes."""
    return "".join(
        f"\\x{ord(one) - 0xDC00:02x}"
        if "\udc80" <= one <= "\udcff"
        else one.encode("unicode_escape").decode()
        if unicodedata.category(one) in UNREADABLE
        else one
        for one in os.fspath(text)
    )


def as_written(text: str) -> str:
    """Text as `write_text` keeps it: what UTF-8 does not have, as in a file name of other bytes, becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file in UTF-8, all of it or nothing, with the line ends that it has. Raises as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(as_written(text), encoding="utf-8", newline="")


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a JSON file, all of it or nothing. Raises as `replacing`."""
    write_text(json.dumps(content, indent=4) + "\n", path)


def sweep_temporaries(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what interrupted writes left in a folder; returns and logs the names. Call it under the folder's lock."""
    files = [path for path in Path(folder).glob(f".*{TEMPORARY_SUFFIX}*") if TEMPORARY.fullmatch(path.name)]
    found = [path for path in files if path.is_file() and not path.is_symlink()]
    for path in found:
        path.unlink(missing_ok=True)
    if found:
        logger.warning(f"Removed from {folder} what an interrupted write had left: {sorted(p.name for p in found)}.")
    return found


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder and try to write into it, before work that would be lost starts.

    Raises:
        ConfigError: it is a file, or would lie in one.
        ResourceError: it cannot be made or written.
    """
    files = [place for place in (Path(folder), *Path(folder).parents) if os.path.isfile(place)]
    if files:
        raise ConfigError(f"{files[0]} is a file: name a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0")
    except OSError as error:
        raise free_space_error(Path(folder) / "", error) from error


def lock_folder(folder: str | os.PathLike[str], timeout: float = 10.0) -> None:
    """Claim a folder for this process until it ends or gives up each of its claims (`unlock_folders`).

    The operating system releases the lock of a process that dies, whichever way it dies.

    Raises:
        ResourceError: another process has it; the message names host and process.
    """
    folder = Path(folder).resolve()
    if folder in _locks and _locks[folder][1] == os.getpid():
        _locks[folder][2] += 1
        return
    lock, owner = FileLock(folder / LOCK_NAME), folder / f"{LOCK_NAME}.json"
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise ResourceError(
            f"{folder} is in use by {holder_of(owner)}: wait for that run or choose another folder "
            f"(if that process is gone, and the folder is on a network disk, remove {folder / LOCK_NAME})"
        ) from None
    except OSError as error:
        raise free_space_error(folder / LOCK_NAME, error) from error
    _locks[folder] = [lock, os.getpid(), 1]
    write_json({"process": os.getpid(), "host": socket.gethostname()}, owner)


def holder_of(owner: Path) -> str:
    """Who wrote the file beside a lock."""
    try:
        content = json.loads(owner.read_text())
        return f"process {int(content['process'])} on {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def unlock_folders(folders: Iterable[str | os.PathLike[str]] | None = None) -> None:
    """Give up a claim of each folder, by default all claims of all; done by itself when the process ends."""
    for folder in list(_locks) if folders is None else [Path(f).resolve() for f in folders]:
        lock, process, claims = _locks.get(folder, (None, 0, 0))
        if lock is None or process != os.getpid():  # a forked worker has no say in it
            continue
        _locks[folder][2] = claims - 1
        if folders is None or claims == 1:
            del _locks[folder]
            with contextlib.suppress(OSError):
                (folder / f"{LOCK_NAME}.json").unlink(missing_ok=True)
                lock.release()


atexit.register(unlock_folders)
