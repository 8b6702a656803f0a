"""One process at a time works in a folder. The lock ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saccade.errors import UserError

NAME = "lock"
TRIES = 100  # each time, whoever was done here has just removed the folder
BUSY = (BlockingIOError, PermissionError)
_ours: set[Path] = set()  # the system's lock is the process's; this is between its threads


@contextmanager
def alone_in(folder: Path, refusal: str) -> Iterator[None]:
    """Make the folder and hold it; where another process, or call, has it, a UserError with these words.

    The lock is of the kind that processes forked from this one do not share: its workers may outlive it for a while.
    Its file goes with it, unless the process is killed; then it stays and hinders nobody.
    """
    path = folder.resolve() / NAME
    if path in _ours:
        raise UserError(refusal)
    _ours.add(path)
    descriptor = None
    try:
        descriptor = _take(path, refusal)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    path.unlink()  # before it is let go: whoever opened it meanwhile sees that it is not this one
            os.close(descriptor)
        _ours.discard(path)


def _take(path: Path, refusal: str) -> int:
    for _ in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be made ({error.strerror}); choose another --out") from None
        try:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BUSY:
            os.close(descriptor)
            raise UserError(refusal) from None
        except (OSError, ImportError):
            return descriptor  # a file system without locks, or Windows
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
    raise UserError(f"{path.parent}: appears and disappears; choose another --out")
