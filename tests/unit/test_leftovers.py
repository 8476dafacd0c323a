"""What an embedded Ray leaves: it goes with its driver, however that ends; what lives, or is another's, stays."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.runtime import leftovers
from cluster.runtime.embedded import LONGEST_NAME_IN_FOLDER, LONGEST_SOCKET_PATH, _own_folder, environment
from cluster.runtime.leftovers import LOCK, PREFIX, clear_dead, own_folder
from nn_models import UserError

DRIVER = (
    "import sys, time; from pathlib import Path; from cluster.runtime.leftovers import own_folder\n"
    "with own_folder(Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(600)"
)


@pytest.fixture
def driver(tmp_path):
    """A process that has a folder, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def agent(driver, tmp_path):
    """A process of that driver's that is named as Ray names its agents, with its log in the folder."""
    named = shutil.copy(shutil.which("sleep") or "", tmp_path / "ray::Agent")
    with (driver[1] / "agent.log").open("w") as log:
        process = subprocess.Popen([named, "600"], stdout=log)
    yield process
    process.kill()
    process.wait()


def gone(folder: Path) -> bool:
    until = time.monotonic() + 30
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.05)
    return not folder.exists()


def test_a_folder_is_its_users_alone_and_gone_at_the_end(tmp_path):
    with own_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "ray").mkdir()
        (folder / "ray" / "log").write_text("told")
    assert list(tmp_path.iterdir()) == []


def test_it_is_gone_after_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), own_folder(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_driver_takes_its_folder_and_agents_along(driver, agent):
    process, folder = driver
    process.kill()
    process.wait()
    assert gone(folder)
    assert agent.wait(timeout=30) == -signal.SIGKILL


def test_the_next_run_clears_what_a_driver_and_its_watcher_left(driver, agent, tmp_path):
    process, folder = driver
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.wait()
    assert folder.exists()
    clear_dead(tmp_path)
    assert not folder.exists()
    assert agent.wait(timeout=30) == -signal.SIGKILL


def test_the_folder_and_the_processes_of_a_living_driver_stay(driver, agent, tmp_path):
    clear_dead(tmp_path)
    assert (driver[1] / LOCK).exists()
    assert agent.poll() is None


def test_what_is_not_ours_stays(tmp_path, monkeypatch):
    ours, other = tmp_path / f"{PREFIX}of-this-user", tmp_path / "session_2000-01-01_00-00-00_000000_1"
    plain = tmp_path / f"{PREFIX}benchmark"  # has no lock: not a session's
    for folder in (ours, other):
        folder.mkdir()
        (folder / LOCK).touch()
    plain.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(other)
    with monkeypatch.context() as patch:
        patch.setattr(leftovers.os, "geteuid", lambda: os.getuid() + 1)
        clear_dead(tmp_path)
    assert ours.exists()
    clear_dead(tmp_path)
    assert not ours.exists()
    assert (other / LOCK).exists()
    assert plain.exists()


def test_only_ray_processes_end(driver, tmp_path):
    process, folder = driver
    (folder / "raylet.log").touch()
    reader = subprocess.Popen(["tail", "-f", str(folder / "raylet.log")], stdout=subprocess.DEVNULL)
    process.kill()
    process.wait()
    assert gone(folder)
    assert reader.poll() is None
    reader.kill()
    reader.wait()


def test_a_place_without_room_for_the_paths_of_sockets_is_not_taken(monkeypatch):
    room = LONGEST_SOCKET_PATH - LONGEST_NAME_IN_FOLDER
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        long = f"{short}/{'d' * room}"
        monkeypatch.setenv("RAY_TMPDIR", long)
        with pytest.raises(UserError, match=rf"RAY_TMPDIR: {long} is too long .*at most {room} characters"):
            _own_folder().__enter__()
        monkeypatch.delenv("RAY_TMPDIR")
        monkeypatch.setattr(tempfile, "tempdir", long)
        with _own_folder() as folder:
            assert folder.parent == Path("/tmp")
        monkeypatch.setenv("RAY_TMPDIR", f"{short}/new")
        with _own_folder() as folder:
            assert folder.parent == Path(short) / "new"


def test_a_place_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nope")
    with pytest.raises(UserError, match=r"/proc/nope: cannot be written \(.*, or set RAY_TMPDIR"):
        _own_folder().__enter__()
    monkeypatch.delenv("RAY_TMPDIR")

    def full() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", full)
    with pytest.raises(UserError, match=r"temporary files: cannot be written \(No usable temporary directory found\)"):
        _own_folder().__enter__()


def test_settings_last_as_long_as_the_session(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    from ray._raylet import AuthenticationMode, get_authentication_mode

    with environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        assert get_authentication_mode() == AuthenticationMode.TOKEN
        assert os.environ["RAY_AUTH_TOKEN"] == "0" * 64
    assert get_authentication_mode() == AuthenticationMode.DISABLED
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ


WRITER = """
import sys, pathlib
while True:
    for name in ("a", "b", "c"):
        place = pathlib.Path(sys.argv[1], name)
        place.mkdir(exist_ok=True)
        (place / "log").write_text("told")
"""


def test_what_is_written_while_it_is_cleared_goes_too(driver):
    process, folder = driver
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stderr=subprocess.DEVNULL)
    while not (folder / "c").exists():
        time.sleep(0.01)
    process.kill()
    time.sleep(0.5)
    writer.kill()
    writer.wait()
    assert gone(folder)
