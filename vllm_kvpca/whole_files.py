"""Files that appear whole or not at all, and one sentence where they cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_kvpca.errors import OutputError

PREFIX = ".kvpca-"
"""Of the folders in which files are written before they are moved; a killed run may leave one."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = NO_ROOM | {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one sentence that names `path`.

    Raises:
        OutputError: in place of an OSError of that kind, or of safetensors' own error for it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in _NOT_WRITABLE:
            raise
        raise OutputError(not_written(path, number)) from error


@contextmanager
def whole_files(folder: Path, last: str = "") -> Iterator[Path]:
    """A folder to write files in; they are moved to `folder` at the end, or not at all.

    Args:
        folder: created if missing; files of the same names are replaced.
        last: name of the file that is moved last: where it is, the others are too.

    Raises:
        OutputError: they cannot be written. What was in `folder` is as before.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            yield new
            for path in sorted(new.iterdir(), key=lambda path: path.name == last):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def not_written(path: object, number: int) -> str:
    """What to tell the user about an error of this number."""
    way_out = "Make room there" if number in NO_ROOM else "Make it writable"
    return (
        f"cannot write to {path}: {os.strerror(number)}. {way_out}, or name another folder, and "
        "run the command again; what was finished before is kept."
    )


def _number(error: Exception) -> int:
    """The system's number of an error, 0 if it has none; safetensors tells it in words alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else 0
