"""A GAN whose halves are warned: saved at the end of the segment, started anew, and nothing shows of it."""

import json
from pathlib import Path
from typing import Any

import pytest

import cluster
from cluster.adversarial.players import LocalPlayers

RECIPE: dict[str, Any] = {
    "name": "played",
    "model": {"kind": "gan", "generator_hidden": [16], "discriminator_hidden": [16]},
    "data": {"kind": "digits"},
    "objective": {"kind": "adversarial"},
    "train": {"global_batch_size": 100, "epochs": 3, "ema_decay": 0.9, "checkpoint_every_steps": 8},
    "adversarial": {"mode": "pipelined"},
}


def lines(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, but for times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time_s", "rows_per_s")} for line in found]


@pytest.mark.parametrize("segments", [(1,), (2, 3)])
def test_a_game_that_is_moved_comes_to_the_same_figures(tmp_path, monkeypatch, caplog, segments):
    whole = cluster.train(RECIPE, run=str(tmp_path / "whole"))
    asked: list[int] = []

    def warned(self: LocalPlayers) -> str | None:
        asked.append(1)
        return "half 0 was told to end" if len(asked) in segments else None

    monkeypatch.setattr(LocalPlayers, "warned", warned)
    moved = cluster.train(RECIPE, run=str(tmp_path / "moved"))
    assert (moved.result["restarts"], moved.result["preemptions"]) == (0, len(segments))
    assert 0 < moved.result["lost_s"] < moved.result["wall_s"]
    assert lines(tmp_path / "moved") == lines(tmp_path / "whole")
    assert moved.metrics == whole.metrics
    name = "model/model.safetensors"
    assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    told = [record.getMessage() for record in caplog.records if "start again elsewhere" in record.getMessage()]
    assert len(told) == len(segments)
    assert told[0].startswith("half 0 was told to end: saved after step ")
