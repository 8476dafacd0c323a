"""`ray up` of cluster/on-premises.yaml: a cluster of three hosts over ssh, a job on all of them, and `ray down`."""

import json
import os
import shutil
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from cluster.submission.bundle import PACKAGES
from tests.ray.site import ADDRESSES, NAMES, lacking, site

ROOT = Path(__file__).parents[2]
FILE = "cluster/on-premises.yaml"
AGAIN_S = 2


def checkout(folder: Path) -> None:
    """A checkout whose file names the hosts, and whose versions are those that are installed here."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    config = yaml.safe_load((folder / FILE).read_text())
    config["provider"] |= {"head_ip": ADDRESSES["head"], "worker_ips": [ADDRESSES["left"], ADDRESSES["right"]]}
    config["auth"]["ssh_user"] = "root"
    (folder / FILE).write_text(yaml.safe_dump(config))
    constraints = folder / "cluster" / "constraints.txt"
    names = [line.partition("==")[0] for line in constraints.read_text().splitlines() if "==" in line]
    constraints.write_text("".join(f"{name}=={version(name)}\n" for name in names))


def provide_python(home: Path) -> None:
    """~/venv of a host, which pip needs to add only this project to: there is no index of packages here."""
    venv.create(home / "venv", symlinks=True)
    (packages,) = (home / "venv" / "lib").glob("python*/site-packages")
    here = Path(yaml.__file__).parents[1]
    (packages / "installed.pth").write_text(f"{here}\n")
    program = home / "venv" / "bin" / "ray"
    program.write_text(f"#!{home}/venv/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
    program.chmod(0o755)
    settings = home / ".config" / "pip"
    settings.mkdir(parents=True)
    # as pip has it, no isolation is told by `false`
    (settings / "pip.conf").write_text("[install]\nno-index = true\nno-build-isolation = false\n")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_hosts_come_up_run_a_job_and_go_down(tmp_path):
    if lacks := lacking() or ("needs setuptools 77" if int(version("setuptools").split(".")[0]) < 77 else None):
        pytest.skip(lacks)
    here, storage = tmp_path / "checkout", tmp_path / "storage"
    checkout(here)
    storage.mkdir()
    for name in NAMES:
        provide_python(tmp_path / name)
    with site(tmp_path, "/mnt/manta") as hosts:

        def user(*command: str, timeout: float = 300) -> str:
            return hosts.run(*command, cwd=here, timeout=timeout)

        user("ray", "get-auth-token", "--generate")
        began = time.monotonic()
        print(user("ray", "up", "--yes", FILE))
        every = os.cpu_count() or 1
        while f"/{len(NAMES) * every:.1f} CPU" not in (status := user("ray", "exec", FILE, "ray status")):
            assert time.monotonic() < began + 300, status
            time.sleep(AGAIN_S)
        print(f"up after {time.monotonic() - began:.0f} s\n{status}")
        tunnel = hosts.start("ray", "dashboard", FILE, cwd=here)
        (tmp_path / "empty").mkdir()
        # each worker takes a host of its own
        job = ["train", "digits-mlp", "--workers=3", f"--set=train.cpus_per_worker={every}", "--set=train.epochs=2"]
        submit = [sys.executable, "-m", "jobs", "submit", *job, "--wait", "--address=http://localhost:8265"]
        print(hosts.run(*submit, cwd=tmp_path / "empty", timeout=400))
        nodes = "from cluster.submission.client import JobServer; print(JobServer('localhost:8265').grows())"
        assert hosts.run(sys.executable, "-c", nodes, cwd=ROOT, timeout=60).splitlines()[-1] == "True"
        tunnel.terminate()
        (result,) = storage.glob("runs/*/result.json")
        assert json.loads(result.read_text())["status"] == "finished"
        environment = json.loads((result.parent / "environment.json").read_text())
        assert environment["num_workers"] == 3
        assert hosts.processes()
        assert {(tmp_path / name / ".ray" / "auth_token").stat().st_mode & 0o777 for name in NAMES} == {0o600}
        down = time.monotonic()
        print(user("ray", "down", "--yes", FILE))
        while left := hosts.processes():
            assert time.monotonic() < down + 200, left
            time.sleep(AGAIN_S)
        print(f"down after {time.monotonic() - down:.0f} s")
