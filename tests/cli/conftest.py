"""The command as tests of it run it: in this process."""

import sys

import pytest

from jobs import cli


@pytest.fixture
def manta(capsys, monkeypatch):
    """Runs the command in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["manta", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def refused(manta):
    """Runs a command that must be refused; returns its one message."""

    def run(*arguments: object) -> str:
        code, out, err = manta(*arguments)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("error: ")
        return err.removeprefix("error: ").strip()

    return run
