"""The one way to write files: beside the target, then renamed onto it, so that nobody ever reads half a file."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, mode: int = 0o644, durable: bool = False) -> Iterator[Path]:
    """A new empty file beside `path`, which replaces `path` when the block ends without an error.

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
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")  # writers look at the ending
    try:
        scratch.touch(0o600, exist_ok=False)
        yield scratch
        if durable:
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
        scratch.chmod(mode)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


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
