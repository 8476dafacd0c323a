"""Ray Data converts, and what it finds wrong is told as if this process had found it."""

import pytest
from PIL import Image

from cluster.data.conversion import ray_mapper
from cluster.data.prepare import prepare
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.storage import Folder
from nn_models import UserError


def test_all_broken_images_are_told_at_once(ray, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.data.sources.image_folder.PART_ROWS", 5)  # several parts, so several tasks
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (4, 4), number).save(photos / name / f"{number}.png")
    for name in ("cat/1.png", "dog/5.png", "dog/8.png"):
        (photos / name).write_bytes(b"<html>")
    with pytest.raises(UserError) as caught:
        prepare(ImageFolderSpec(path=str(photos)), Folder(tmp_path / "out"), mapper=ray_mapper(ray))
    assert sorted(str(caught.value).splitlines()) == [
        f"{photos}/{name}.png: 6 bytes in no known image format; replace or remove it"
        for name in ("cat/1", "dog/5", "dog/8")
    ]
    assert not (tmp_path / "out" / "manifest.json").exists()
