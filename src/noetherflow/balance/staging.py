"""Write files or whole folders beside their target, and rename them when all of it is there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from noetherflow.core.files import is_free
from noetherflow.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no such locks: what killed writers leave there stays
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""In every staging folder: held by the process that writes, freed by the system when that is killed."""


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or folder at, which becomes `target` when the block ends without an error.

    It lies in a hidden folder of its own. What writers that were killed have left there is removed first. An existing
    file is replaced, an existing folder is not.

    Args:
        target: the file or folder to make; its parent is made if it is missing.

    Yields:
        The path to write at, with the target's name; nothing is there yet.

    Raises:
        CheckpointError: the target is a folder that exists.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_litter(target)
    room = target.with_name(_prefix(target) + uuid.uuid4().hex)  # named first: Ctrl-C may come as the folder is made
    descriptor = -1
    try:
        os.mkdir(room, 0o700)
        descriptor = os.open(room / LOCK, os.O_CREAT | os.O_RDWR)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield room / target.name
        _sync(room / target.name)
        if target.is_dir():
            raise CheckpointError(f"could not write {target}: the folder exists; name a new one")
        os.replace(room / target.name, target)
        _sync_folder(target.parent)
    finally:
        try:
            _discard(room, descriptor)
        except BaseException:  # Ctrl-C during the removal
            shutil.rmtree(room, ignore_errors=True)
            raise


def _discard(room: Path, descriptor: int) -> None:
    """Remove a staging folder, and let go of its lock."""
    shutil.rmtree(room, ignore_errors=True)
    if descriptor >= 0:
        os.close(descriptor)


def remove_litter(target: Path) -> list[Path]:
    """Remove the staging folders for `target` whose writers are gone; those of running writers stay.

    Returns:
        What was removed.
    """
    removed = []
    for room in target.parent.glob(f"{_prefix(target)}*"):
        if room.is_dir() and is_free(room / LOCK):  # without a lock it was left before that was made
            shutil.rmtree(room, ignore_errors=True)
            removed.append(room)
    return removed


def check_space(target: Path, needed: int) -> None:
    """Make sure, before long work starts, that the disk has room for `needed` bytes at the target.

    Raises:
        CheckpointError: it has not.
    """
    free = shutil.disk_usage(_existing(target.parent)).free
    if free < needed:
        raise CheckpointError(
            f"could not write {target}: it takes {needed / 1e9:.3g} GB beside what is there, the disk has "
            f"{free / 1e9:.3g} GB free; free some, or name a target on another disk"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else _existing(folder.parent)


def _sync(path: Path) -> None:
    """Wait until the file, or every file of the folder, is on the disk."""
    if path.is_dir():
        for inside in sorted(path.iterdir()):
            _sync(inside)
        _sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Some file systems cannot sync folders; then the rename is as safe as they make it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
