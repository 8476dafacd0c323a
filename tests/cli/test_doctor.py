"""`manta doctor` of this machine, as typed; what it cannot examine is refused."""

import json
from pathlib import Path

import pytest

from tests.unit.test_submission import Server


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "MANTA_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def checks(out: str) -> dict[str, dict[str, str | None]]:
    return {line["check"]: line for line in json.loads(out)["checks"]}


def test_this_machine_for_people_and_programs(manta, tmp_path: Path):
    code, out, err = manta("doctor", "digits-mlp", "--json")
    assert code == 0, out + err
    found = checks(out)
    assert {"versions", "disk", "storage", "recipe", "data", "steps", "first step"} <= set(found)
    assert not any(line["status"] == "failed" for line in found.values())
    assert found["storage"]["message"].startswith(f"{tmp_path} can be written, ")
    code, out, _ = manta("doctor")
    assert code == 0
    marks = {line.split()[0] for line in out.splitlines()}
    assert marks <= {"ok", "warning"}
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_told_with_what_to_do_and_the_rest_is_checked(manta, tmp_path: Path):
    (tmp_path / "file").write_text("")
    data = f"--set=data={{kind: shards, path: {tmp_path / 'none'}}}"
    code, out, _ = manta("doctor", "digits-mlp", data, f"--run={tmp_path / 'file'}", "--json")
    assert code == 1
    assert not json.loads(out)["ok"]
    found = checks(out)
    failed = {name for name, line in found.items() if line["status"] == "failed"}
    assert failed == {"data", "storage"}
    assert all(found[name]["fix"] for name in failed)
    code, out, _ = manta("doctor", "digits-mlp", data)
    assert code == 1
    assert "FAILED   data " in out


def test_a_recipe_that_cannot_begin(manta):
    code, out, _ = manta("doctor", "digits-mlp", "--set=schedule={kind: constant}", "--set=train.epochs=1", "--json")
    assert code == 0, out
    code, out, _ = manta("doctor", "fashion-autoencoder", "--set=data={kind: listops, rows: 50}", "--json")
    assert code == 1
    assert checks(out)["recipe"]["status"] == "failed"
    assert "steps" not in checks(out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope"], "nope: no such recipe or file"),
        (["digits-mlp", "--set=model.hiden=[3]"], "model.hiden: unknown field; did you mean hidden?"),
        (["--set=train.epochs=3"], "--set: there is no recipe to change"),
        (["--workers=x"], "--workers: 'x' is not a number of workers"),
        (["--workers=0", "--address=head:6379"], "--address: training with --workers 0 uses no cluster"),
        (["--address=ray://head:10001"], "the Ray client cannot drive training"),
        (["--address=127.0.0.1:9"], "--address: 127.0.0.1:9: no Ray cluster answers there"),
        (
            ["digits-mlp", "--address=http://head:8265"],
            "manta submit doctor digits-mlp --address http://head:8265 --wait",
        ),
    ],
)
def test_what_cannot_be_examined_is_refused(refused, arguments: list[str], told: str):
    assert told in refused("doctor", *arguments)


def test_a_doctor_is_submitted_without_being_asked_what_it_will_tell(tmp_path: Path):
    from cluster.submission.bundle import bundle
    from jobs.commands.submission import Asked, admit, new_id, start

    options = ["--workers=1000", "--run=s3://bucket/run"]
    for recipe in ([], ["digits-mlp"]):
        asked, server = Asked.of("doctor", [*recipe, *options]), Server({"CPU": 1})
        admitted = admit(asked, bundle(tmp_path), server, entry={}, data_on_cluster=False)
        assert (admitted is None) == (not recipe)
        assert new_id("doctor", admitted).startswith("doctor-")
        start("job-7", asked, bundle(tmp_path), server, {}, {}, with_manta=False, python="python")
        assert server.submitted[0][0] == " ".join(["python -P -m jobs doctor", *recipe, *options])
