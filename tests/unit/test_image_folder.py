"""Folders of images: which images there are, of which split and class; what is not used is said, what is broken too."""

import os
from pathlib import Path

import pytest
from PIL import Image

from cluster.data.prepare import prepared
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.storage import Folder
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")


def draw(file: Path, colour: int = 0, *, size: tuple[int, int] = (4, 4), **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(file, **options)


def draw_classes(root: Path, rows: int, *, first: int = 0, names: tuple[str, ...] = ("cat", "dog")) -> None:
    """Images whose red is their number, counted from `first`."""
    for index, name in enumerate(names):
        for row in range(rows):
            draw(root / name / f"{row}.png", first + index * rows + row)


def numbers(spec: ImageFolderSpec) -> dict[str, list[int]]:
    """The red of each split's images."""
    data = prepared(spec)
    found = {split: made.split_rows(data, split).columns["input"].values[:, 0, 0, 0] for split in data.manifest.splits}
    return {split: sorted(values.tolist()) for split, values in found.items()}


def refusal(spec: ImageFolderSpec | ParquetSpec) -> str:
    with pytest.raises(UserError) as caught:
        prepared(spec)
    return str(caught.value)


def unused(spec: ImageFolderSpec, caplog) -> str:
    """What is said of the folder when it is prepared."""
    caplog.clear()
    prepared(spec)
    return "\n".join(record.getMessage() for record in caplog.records)


# -- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("validation", ["val", "Valid", "validation", None])
@pytest.mark.parametrize("test", ["Test", "testing", None])
def test_folders_of_splits_in_any_case(train, validation, test, tmp_path, caplog):
    draw_classes(tmp_path / train, 10)
    if validation:
        draw_classes(tmp_path / validation, 3, first=100)
    if test:
        draw_classes(tmp_path / test, 2, first=200)
    found = numbers(ImageFolderSpec(path=str(tmp_path)))
    assert found["validation"] == (list(range(100, 106)) if validation else found["validation"])
    assert found["test"] == (list(range(200, 204)) if test else found["test"])
    drawn = [] if validation else found["validation"]
    drawn = drawn if test else drawn + found["test"]
    assert sorted(found["train"] + drawn) == list(range(20))
    assert prepared(ImageFolderSpec(path=str(tmp_path))).manifest.class_names == ("cat", "dog")
    assert not caplog.records


def test_a_folder_beside_those_of_splits_is_not_used_and_said(tmp_path, caplog):
    draw_classes(tmp_path / "train", 5)
    draw_classes(tmp_path / "extra", 5, first=100)
    spec = ImageFolderSpec(path=str(tmp_path))
    assert unused(spec, caplog) == f"{tmp_path}: not used: the folder extra"
    assert sorted(number for of_split in numbers(spec).values() for number in of_split) == list(range(10))


def test_test_images_without_labels_are_not_used_and_said(tmp_path, caplog):
    draw_classes(tmp_path / "train", 10)
    draw(tmp_path / "test" / "1.png", 200)
    spec = ImageFolderSpec(path=str(tmp_path))
    assert unused(spec, caplog) == f"{tmp_path}: not used: the folder test, whose images are in no class folders"
    assert 200 not in numbers(spec)["test"]


def test_a_test_folder_without_images_is_not_used_and_said(tmp_path, caplog):
    draw_classes(tmp_path / "train", 10)
    (tmp_path / "test").mkdir()
    spec = ImageFolderSpec(path=str(tmp_path))
    assert unused(spec, caplog) == f"{tmp_path}: not used: the folder test, which holds no images"
    assert len(numbers(spec)["test"]) == 2
    (tmp_path / "test").rename(tmp_path / "train" / "cow")
    assert refusal(spec) == f"{tmp_path}/train/cow: no images in this class folder; add some or remove it"


def test_two_folders_for_one_split(tmp_path):
    for name in ("train", "val", "Validation"):
        draw_classes(tmp_path / name, 3)
    said = refusal(ImageFolderSpec(path=str(tmp_path)))
    assert said == f"data.path: {tmp_path} has the folders Validation and val for one split; keep one of them"


def test_a_test_folder_beside_classes(tmp_path):
    draw_classes(tmp_path, 3)
    draw_classes(tmp_path / "Test", 3)
    said = refusal(ImageFolderSpec(path=str(tmp_path)))
    assert said.startswith(
        f"data.path: {tmp_path} has the folder Test of a split, but none with class folders that is "
    )
    (tmp_path / "Test").rename(tmp_path / "tests")
    assert prepared(ImageFolderSpec(path=str(tmp_path))).manifest.class_names == ("cat", "dog", "tests")


def test_trains_may_be_a_class(tmp_path):
    draw_classes(tmp_path, 10, names=("car", "plane", "train"))
    assert prepared(ImageFolderSpec(path=str(tmp_path))).manifest.class_names == ("car", "plane", "train")


def test_a_validation_class_without_training_images(tmp_path):
    draw_classes(tmp_path / "train", 3)
    draw_classes(tmp_path / "val", 3, names=("cat", "cow"))
    said = refusal(ImageFolderSpec(path=str(tmp_path)))
    assert said == f"{tmp_path}/val/cow: a class without training images; add some or remove it"


# -- images without labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "Train", "only"])
def test_images_without_class_folders_are_of_one_class(inside, tmp_path, caplog):
    for number in range(20):
        draw(tmp_path / inside / f"{number}.png", number)
    data = prepared(ImageFolderSpec(path=str(tmp_path)))
    assert data.manifest.class_names == ("only" if inside == "only" else "all",)
    assert sum(data.manifest.rows(split) for split in data.manifest.splits) == 20
    assert not caplog.records


def test_splits_without_class_folders(tmp_path):
    for number in range(20):
        draw(tmp_path / "train" / f"{number}.png", number)
        draw(tmp_path / "test" / f"{number}.png", 100 + number)
    spec = ImageFolderSpec(path=str(tmp_path), validation_fraction=0)
    assert numbers(spec) == {"train": list(range(20)), "test": list(range(100, 120))}
    assert prepared(spec).manifest.class_names == ("all",)


# -- endings ---------------------------------------------------------------------------------------------------------


def test_whatever_can_be_opened_is_taken(tmp_path, caplog):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "ppm": "PPM", "tga": "TGA", "jp2": "JPEG2000", "ico": "ICO"}
    for number, (ending, kind) in enumerate({**kinds, "webp": "WEBP", "avif": "AVIF", "png": "PNG"}.items()):
        draw(tmp_path / "cat" / f"{number}.{ending}", size=(16, 16), format=kind)
        draw(tmp_path / "dog" / f"{number}.png", size=(16, 16))
    data = prepared(ImageFolderSpec(path=str(tmp_path)))
    assert sum(data.manifest.rows(split) for split in data.manifest.splits) == 20
    assert not caplog.records


def test_how_many_files_are_left_out_is_said_and_why(tmp_path, caplog):
    draw_classes(tmp_path, 5)
    for name in ("README.md", "cat/1.txt", "cat/2.TXT", "dog/noending", "dog/3.eps", ".hidden", "cat/.DS_Store"):
        (tmp_path / name).write_text("")
    draw(tmp_path / "loose.png")
    assert unused(ImageFolderSpec(path=str(tmp_path)), caplog) == (
        f"{tmp_path}: not used: 1 image in no class folder; 5 files of endings that no image has "
        "(.txt 2, .md 1, .eps 1, none 1)"
    )


# -- names that are not UTF-8 ----------------------------------------------------------------------------------------


def test_what_is_no_image_is_passed_over_whatever_its_name(tmp_path, caplog):
    draw_classes(tmp_path, 5)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.txt")).write_text("")
    said = unused(ImageFolderSpec(path=str(tmp_path)), caplog)
    assert said == f"{tmp_path}: not used: 1 file of endings that no image has (.txt 1)"


@pytest.mark.parametrize("name", [b"cat/caf\xe9.png", b"caf\xe9/1.png"])
def test_an_image_whose_name_is_not_utf_8_is_named(name, tmp_path):
    draw_classes(tmp_path, 5)
    draw(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    said = refusal(ImageFolderSpec(path=str(tmp_path)))
    assert said == f"{tmp_path}/{name.decode('ascii', 'backslashreplace')}: a name that is not UTF-8; rename it"


def test_a_parquet_folder_with_a_name_that_is_not_utf_8(tmp_path):
    made.features(tmp_path, 60)
    spec = ParquetSpec(path=str(tmp_path), input="x", target="y")
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    other.write_text("")
    assert prepared(spec).manifest.rows("train") == 48
    other.rename(other.with_suffix(".parquet"))
    assert refusal(spec) == f"{tmp_path}/caf\\xe9.parquet: a name that is not UTF-8; rename it"


def test_a_folders_names_are_listed_whatever_they_are(tmp_path):
    for name in (b"caf\xe9", b"a", b".hidden\xe9"):
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_text("")
    assert Folder(tmp_path).names() == ["a", "caf\udce9"]
    assert [name for name, _ in Folder(tmp_path).walk()] == ["a", "caf\udce9"]


def test_a_folder_whose_own_name_is_not_utf_8():
    with pytest.raises(UserError, match=r"^/tmp/caf\\xe9: a name that is not UTF-8; choose another one, or rename it$"):
        Folder("/tmp/caf\udce9")


# -- broken files ----------------------------------------------------------------------------------------------------


def test_all_broken_files_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.data.sources.image_folder.PART_ROWS", 7)  # over all parts
    draw_classes(tmp_path, 20)
    for name in ("cat/0.png", "cat/7.png", "dog/3.png"):
        (tmp_path / name).write_bytes(b"<html>")
    for name in ("cat/9.png", "dog/11.png"):
        draw(tmp_path / name, size=(5, 9))
    lines = refusal(ImageFolderSpec(path=str(tmp_path))).splitlines()
    broken = [
        f"{tmp_path}/{name}.png: 6 bytes in no known image format; replace or remove it"
        for name in ("cat/0", "cat/7", "dog/3")
    ]
    assert sorted(line for line in lines if "replace" in line) == broken
    # what one field mends is said once
    (other,) = [line for line in lines if line not in broken]
    assert other.endswith("9x5 pixels where the first image has 4x4; set data.image_size to resize them all")


def test_of_very_many_broken_files_the_first_are_told_and_how_many_more(tmp_path):
    draw_classes(tmp_path, 40)
    for row in range(40):
        (tmp_path / "cat" / f"{row}.png").write_bytes(b"<html>")
    lines = refusal(ImageFolderSpec(path=str(tmp_path))).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "data: 20 more such problems; mend those too"


def test_nothing_but_broken_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    assert refusal(ImageFolderSpec(path=str(tmp_path))).splitlines() == [
        f"{tmp_path}/{name}/1.png: 0 bytes in no known image format; replace or remove it" for name in ("a", "b")
    ]
