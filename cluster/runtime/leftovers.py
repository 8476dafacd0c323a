"""Leftovers: the folder and the processes of an embedded Ray, which go once the process that started it has ended.

Each folder has a lock, which its driver holds while it lives. Whoever gets it may clear the folder: the driver at the
end, the watcher that it starts (this file as a script: nothing else in a process survives SIGKILL), or the next run.
Only the standard library is imported, so that the watcher starts at once and stays small.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "manta-"
LOCK = "driver.lock"


@contextmanager
def own_folder(base: Path) -> Iterator[Path]:
    """A new folder in `base` that only this user can enter; gone after the block, or soon after this process's death.

    Raises OSError where it cannot be written.
    """
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        lock = _locked(folder / LOCK, create=True)  # None: another run, which clears up, was faster
    watching = [sys.executable, "-I", "-S", __file__, str(folder)]
    nothing = subprocess.DEVNULL
    watcher = subprocess.Popen(  # in a session of its own: a Ctrl-C is not for it
        watching, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
    )
    try:
        yield folder
    finally:
        _clear(folder)
        os.close(lock)  # not inherited by what was started meanwhile
        watcher.kill()
        watcher.wait()


def clear_dead(base: Path) -> None:
    """Clear what drivers of this user have left in `base` that died together with their watchers."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()  # of a link too: it belongs to who made it
            if found.st_uid == os.geteuid():
                _clear_once_free(folder, wait=False)


def _clear_once_free(folder: Path, *, wait: bool) -> None:
    lock = _locked(folder / LOCK, wait=wait)
    if lock is not None:
        _clear(folder)
        os.close(lock)


def _locked(path: Path, *, wait: bool = False, create: bool = False) -> int | None:
    """The file, open and locked; None where another process has it, or where there is none (any more)."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except BlockingIOError:
        pass
    except OSError:
        if create:  # a disk without locks: nobody can tell there who is alive, so that nobody clears up
            return lock
    os.close(lock)
    return None


def _clear(folder: Path) -> None:
    for process in _processes_of(folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)  # what is written at this moment stays for the next run


def _processes_of(folder: Path) -> list[int]:
    """Ray's processes of this user that have a file open in the folder, as all have their logs.

    Raylet and GCS end with their driver. Ray's agents would try for a minute to tell it that the raylet has died.
    """
    inside = f"{folder}{os.sep}"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            ours = process.stat().st_uid == os.geteuid() and (process / "comm").read_text().startswith("ray::")
            if ours and any(os.readlink(file).startswith(inside) for file in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


if __name__ == "__main__":
    _clear_once_free(Path(sys.argv[1]), wait=True)
