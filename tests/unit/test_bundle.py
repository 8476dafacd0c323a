"""What is uploaded of a folder: what Ray's client takes, but for environments, caches and runs; its size; a wheel."""

import os
import zipfile
from pathlib import Path

import pytest

import cluster
from cluster.submission.bundle import MIB, PACKAGES, bundle, wheel
from nn_models.errors import UserError


def write(folder: Path, name: str, num: int = 1) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(bytes(num))


def test_what_a_job_has_no_use_of_is_left_out(tmp_path):
    wanted = {"nets.py": 3, "data/train.csv": 5, "more/recipe.yaml": 1}
    for name, num in wanted.items():
        write(tmp_path, name, num)
    for name in (".git/HEAD", ".venv/x", "env/pyvenv.cfg", "env/lib/x.py", "__pycache__/nets.pyc", "a/b.pyc"):
        write(tmp_path, name)
    for name in (
        ".some_cache/CACHEDIR.TAG",
        ".some_cache/v/x",
        "here/recipe.yaml",
        "here/environment.json",
        "here/m/x",
    ):
        write(tmp_path, name)
    (tmp_path / "circle").symlink_to(tmp_path)
    found = bundle(tmp_path)
    assert found.files == wanted
    assert found.num_bytes == 9
    assert found.holds(tmp_path / "data")
    assert found.holds(tmp_path / "nets.py")
    assert not found.holds(tmp_path / "here")
    assert not found.holds(tmp_path.parent)


def test_ignore_files_are_heeded_and_their_rules_hold_for_what_is_below(tmp_path):
    for name in ("a.log", "keep.log", "b/a.log", "b/c/secret", "b/c/open", "big.bin"):
        write(tmp_path, name)
    (tmp_path / ".gitignore").write_text("*.log\n!keep.log\n")
    (tmp_path / ".rayignore").write_text("/big.bin\n")
    (tmp_path / "b" / ".gitignore").write_text("secret\n")
    assert set(bundle(tmp_path).files) == {".gitignore", ".rayignore", "b/.gitignore", "b/c/open", "keep.log"}


def test_what_is_no_file_is_left_out(tmp_path):
    """Ray would wait for ever for somebody to write into a pipe."""
    from ray._private.runtime_env.packaging import get_uri_for_directory

    write(tmp_path, "work/a.py")
    write(tmp_path, "elsewhere/big", 7)
    os.mkfifo(tmp_path / "work" / "pipe")
    for name, to in (("nowhere", "no"), ("itself", "work/itself"), ("there", "elsewhere"), ("file", "elsewhere/big")):
        (tmp_path / "work" / name).symlink_to(tmp_path / to)
    found = bundle(tmp_path / "work")
    assert found.files == {"a.py": 1, "file": 7, "there/big": 7}
    assert get_uri_for_directory(str(tmp_path / "work"), include_gitignore=True, excludes=list(found.excludes))


def test_what_the_runtime_environment_excludes_does_not_count(tmp_path):
    for name in ("a.log", "b/c.log", "b/d"):
        write(tmp_path, name)
    assert bundle(tmp_path, without=["*.log"]).files == {"b/d": 1}
    assert bundle(tmp_path, without=["*"]).files == {}
    with pytest.raises(UserError, match="--runtime-env: excludes: "):
        bundle(tmp_path, without=["a", "!"])


def test_an_empty_folder(tmp_path):
    assert (bundle(tmp_path).files, bundle(tmp_path).largest()) == ({}, [])


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"ok\n!\n"])
def test_an_ignore_file_that_is_none_is_named(tmp_path, content):
    write(tmp_path, ".gitignore")
    (tmp_path / ".gitignore").write_text("*.log\n")
    write(tmp_path, "b/.rayignore")
    (tmp_path / "b" / ".rayignore").write_bytes(content)
    with pytest.raises(UserError, match=r"b/.rayignore: no list of patterns \("):
        bundle(tmp_path)


def test_ray_uploads_just_these_files(tmp_path):
    """Its own archive of the folder, with the patterns that it is given."""
    from ray._private.runtime_env.packaging import create_package

    names = ["nets.py", "what!/is [this]*?/x", "#1/y", "!2/z"]
    for name in names:
        write(tmp_path / "work", name)
    for run in ("a [run]*", "!run", "#run", "deep/run?"):
        write(tmp_path / "work", f"{run}/recipe.yaml")
        write(tmp_path / "work", f"{run}/environment.json")
    found = bundle(tmp_path / "work")
    create_package(str(tmp_path / "work"), tmp_path / "x.zip", include_gitignore=True, excludes=list(found.excludes))
    packed = {name for name in zipfile.ZipFile(tmp_path / "x.zip").namelist() if not name.endswith("/")}
    assert packed == set(found.files) == set(names)


def test_the_largest_entries_come_first_and_a_folder_is_opened_where_one_thing_is_most_of_it(tmp_path):
    write(tmp_path, "data/images/all.bin", 900)
    write(tmp_path, "data/readme", 1)
    for number in range(10):
        write(tmp_path, f"many/{number}", 50)
    write(tmp_path, "nets.py", 10)
    assert bundle(tmp_path).largest(3) == [("data/images/all.bin", 900), ("many/", 500), ("nets.py", 10)]


def test_more_than_the_limit_is_refused_by_name(tmp_path):
    write(tmp_path, "video.bin", 3 * MIB)
    found = bundle(tmp_path)
    found.refuse_larger(3)
    with pytest.raises(UserError, match=r"3 MiB would be uploaded, more than 2 MiB; largest: video.bin 3 MiB; list in"):
        found.refuse_larger(2)
    with pytest.raises(UserError, match="--upload-limit: 1000 MiB: Ray takes 512 MiB at most"):
        found.refuse_larger(1000)


def test_a_file_that_has_no_legible_name(tmp_path):
    (tmp_path / "caf\udce9").write_bytes(b"x")
    with pytest.raises(UserError, match=r"caf\\xe9: a name that is not UTF-8"):
        bundle(tmp_path)


def test_names_that_no_line_can_show(tmp_path):
    write(tmp_path, "bell\x07", 9)
    assert bundle(tmp_path).largest() == [("'bell\\x07'", 9)]
    write(tmp_path, "two\nlines")
    with pytest.raises(UserError, match=r"two\\nlines': a name of several lines; rename it"):
        bundle(tmp_path)


def test_this_project_brings_manta_and_its_wheel_has_all_of_it(tmp_path):
    checkout = Path(cluster.__file__).parents[1]
    assert bundle(checkout).has_manta
    assert not bundle(tmp_path).has_manta
    with wheel() as one:
        names = set(zipfile.ZipFile(one).namelist())
        first = one.read_bytes()
    sources = {
        path.relative_to(checkout).as_posix() for package in PACKAGES for path in (checkout / package).rglob("*.py")
    }
    assert sources <= names
    assert "jobs/recipes/digits-mlp.yaml" in names
    # what brings a cluster up takes the checkout along: without one it is of no use
    assert not [
        name for name in names if name.startswith("cluster/") and name.endswith((".yaml", ".txt", "Dockerfile"))
    ]
    assert any(name.endswith(".dist-info/METADATA") for name in names)
    with wheel() as again:
        assert again.read_bytes() == first  # the same content is uploaded once
