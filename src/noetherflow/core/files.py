"""The one way to write files: beside the target, then renamed onto it, so that nobody ever reads half a file."""

from __future__ import annotations

import glob
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: what killed writers leave there stays
    fcntl = None  # type: ignore[assignment]

YOUNG = 60.0
"""Seconds in which a file without a lock may belong to a writer that is about to lock it."""


@contextmanager
def replacing(path: str | Path, *, mode: int = 0o644, durable: bool = False) -> Iterator[Path]:
    """A new empty file beside `path`, which replaces `path` when the block ends without an error.

    What writers of `path` that were killed have left is removed first.

    Args:
        path: the target; its folder is made if it is missing. Of a symbolic link it is the file that the link names.
        mode: permissions of the new file.
        durable: wait until the contents are on the disk before the rename (checkpoints), so that a power cut leaves
            the old file or the new one.

    Yields:
        The file to write to. After an error it is removed, and the target is as it was.

    Example:
        >>> with replacing("notes/today.txt") as scratch:
        ...     _ = scratch.write_text("all of it, or nothing")
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"):
        with suppress(FileNotFoundError):  # its writer may end meanwhile
            if left.stat().st_mtime < time.time() - YOUNG and is_free(left):
                left.unlink()
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")  # writers look at the ending
    descriptor = -1
    try:
        descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield scratch
        if durable:
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
        scratch.chmod(mode)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


def is_free(lock: Path) -> bool:
    """Whether no process holds the lock on a file, so that its writer is gone; a file that is missing is free."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def check_writable(path: str | Path) -> None:
    """Make sure, before long work starts, that `path` can be written: by making a file without a name beside it.

    Raises:
        OSError: what the system says against it.
    """
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by UTF-8 `text` in one step."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
