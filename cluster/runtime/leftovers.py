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
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "manta-"
LOCK = "driver.lock"
CLEARING_S = 30.0  # processes that end or start go on writing


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
    """End its processes and remove it. The lock goes last: with it, the next run clears what could not go in time."""
    last = time.monotonic() + CLEARING_S
    while _emptied(folder):
        if time.monotonic() > last:
            return
        time.sleep(0.05)  # something was written meanwhile
    shutil.rmtree(folder, ignore_errors=True)


def _emptied(folder: Path) -> list[Path]:
    """What is left in it after trying, but for the lock."""
    for process in _processes_of(folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for inside in _contents(folder):
        with suppress(OSError):
            inside.unlink()  # of a folder it fails
        shutil.rmtree(inside, ignore_errors=True)
    return _contents(folder)


def _contents(folder: Path) -> list[Path]:
    return [inside for inside in folder.glob("*") if inside.name != LOCK]


def _processes_of(folder: Path) -> list[int]:
    """Ray's processes of this user that have a file open in the folder, as all have their logs, or start with one.

    Raylet and GCS end with their driver. Ray's agents would try for a minute to tell it that the raylet has died.
    """
    inside = f"{folder}{os.sep}"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if process.stat().st_uid == os.geteuid() and (_is_rays(process, inside) or _starts(process, inside)):
                found.append(int(process.name))
    return found


def _is_rays(process: Path, inside: str) -> bool:
    named = (process / "comm").read_text().startswith("ray::")
    return named and any(os.readlink(file).startswith(inside) for file in (process / "fd").iterdir())


def _starts(process: Path, inside: str) -> bool:
    """Whether it is about to be one: it has no name yet, but the place of the raylet's socket among its options."""
    options = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
    return any(option.startswith(f"--raylet-name={inside}") for option in options)


if __name__ == "__main__":
    _clear_once_free(Path(sys.argv[1]), wait=True)
