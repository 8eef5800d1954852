"""Folders that are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path


def check_out(out):
    """Refuse to write over something.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise FileExistsError(f"{str(out)!r} is there and not an empty folder. Pass another one, or remove it.")


@contextlib.contextmanager
def whole_folder(out):
    """A folder to write into, beside `out`: renamed to it at the end, or gone where anything goes wrong.

    Raises:
        FileExistsError: as `check_out`.
    """
    check_out(out)
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        check_out(out)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
