"""Machine: what one node has: versions, cores, memory, shared memory, disk, GPUs, time. Plain functions, no Ray."""

import hashlib
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.runtime.limits import machine_bytes

SHARED_MEMORY = "/dev/shm"  # where Ray's object store, NCCL and torch's own processes keep what they share
PACKAGES = ("nn_models", "cluster", "jobs")
CODE = "code of manta"
# beside torch and manta: what travels between nodes is pickled by these, or figures come from them
LIBRARIES = ("ray", "torchvision", "numpy", "pyarrow", "pydantic")


@dataclass(frozen=True)
class Disk:
    """Bytes of the disk that a folder is on."""

    path: str
    total: int
    free: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "Disk | None":
        """Of the folder, or the nearest one above it that is there; None where that cannot be found out."""
        place = Path(path).absolute()
        for folder in (place, *place.parents):
            try:
                found = shutil.disk_usage(folder)
            except OSError:
                continue
            return cls(str(path), found.total, found.free)
        return None


@dataclass(frozen=True)
class Gpu:
    """One that torch sees."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a node has."""

    versions: dict[str, str]
    cores: int
    memory_bytes: int
    shared_memory: Disk | None
    temporary: Disk | None  # where Ray has its files, and spills objects to
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None = None  # why torch sees none of those that there may be


def machine(temporary: str | None = None) -> Machine:
    """This one. `temporary` is Ray's folder, by default the system's."""
    gpus, problem = _gpus()
    return Machine(
        versions=versions(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=machine_bytes(),
        shared_memory=Disk.of(SHARED_MEMORY) if Path(SHARED_MEMORY).is_dir() else None,
        temporary=Disk.of(temporary or tempfile.gettempdir()),
        gpus=gpus,
        gpu_problem=problem,
    )


def versions() -> dict[str, str]:
    """Of Python, torch, the libraries and manta; what is not installed is left out."""
    import torch

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in (*LIBRARIES, "manta-train"):
        try:
            found[name.removesuffix("-train")] = metadata.version(name)
        except metadata.PackageNotFoundError:  # manta runs from a checkout too
            continue
    return {**found, CODE: code_digest(Path(__file__).parents[2])}


def code_digest(folder: Path) -> str:
    """Differs when a module of the packages in this folder does: checkouts of one version are seldom of one state."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((folder / package).rglob("*.py")):
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    import torch

    try:
        if not torch.cuda.is_available():
            return (), "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no driver"
        found = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            found.append(Gpu(torch.cuda.get_device_name(number), total, free))
        return tuple(found), None
    except RuntimeError as error:  # a driver and a library of different versions; a GPU that has fallen off its bus
        return (), str(error).strip().splitlines()[0]
