"""Sources of images: what may be trained on, and what is said about everything that may not."""

import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cluster.data.prepare import prepared
from cluster.data.sources import images as named
from cluster.data.sources.base import DataSpec
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import CIFAR10Spec, DigitsSpec, FashionMNISTSpec, MNISTSpec
from cluster.data.sources.pixels import decode_image
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 30


def refusal(spec: DataSpec) -> str:
    """The one line with which the data is refused."""
    with pytest.raises(UserError) as caught:
        prepared(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert "object at 0x" not in message
    return message


# -- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    data = prepared(DigitsSpec())
    assert data.manifest.signature.input_shape == (1, 8, 8)
    assert data.manifest.class_names == tuple("0123456789")
    splits = [made.split_rows(data, split) for split in ("train", "validation", "test")]
    assert [len(rows.ids) for rows in splits] == [1258, 180, 359]
    ours = np.concatenate([rows.columns["input"].values for rows in splits]).reshape(-1, 64)
    targets = np.concatenate([rows.columns["target"].values for rows in splits])
    bunch = load_digits()
    theirs = np.round(bunch.data * 255 / 16)

    def in_order(pixels, labels):
        return sorted(map(tuple, np.column_stack([pixels, labels]).astype(int).tolist()))

    assert in_order(ours, targets) == in_order(theirs, bunch.target)


def test_digits_of_another_size():
    assert prepared(DigitsSpec(image_size=(12, 10))).manifest.signature.input_shape == (1, 12, 10)


# -- Fashion-MNIST, MNIST, CIFAR-10 ----------------------------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path, monkeypatch) -> Path:
    """A folder with small files in Fashion-MNIST's format, whose sums count as the published ones."""
    sums = {}
    for prefix, rows in (("train", 60), ("t10k", 20)):
        pixels = np.arange(rows * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        contents = {
            f"{prefix}-images-idx3-ubyte": b"\0\0\x08\x03" + np.array([rows, 28, 28], ">u4").tobytes() + pixels,
            f"{prefix}-labels-idx1-ubyte": b"\0\0\x08\x01" + np.array([rows], ">u4").tobytes() + bytes([3] * rows),
        }
        for name, content in contents.items():
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(named, "FASHION_MD5", sums)
    return tmp_path


def test_fashion_mnist_from_a_root(fashion):
    data = prepared(FashionMNISTSpec(root=str(fashion)))
    assert {split: data.manifest.rows(split) for split in data.manifest.splits} == {
        "train": 54,
        "validation": 6,
        "test": 20,
    }
    test = made.split_rows(data, "test")
    assert test.columns["input"].values.shape == (20, 1, 28, 28)
    assert test.columns["input"].values.ravel().tolist() == [number % 256 for number in range(20 * 784)]
    assert test.columns["target"].values.tolist() == [3] * 20


def test_fashion_mnist_unpacked_and_in_torchvisions_folders(fashion, tmp_path):
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in fashion.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert prepared(FashionMNISTSpec(root=str(tmp_path / "root"))).manifest.rows("train") == 54


def test_fashion_mnist_with_another_md5(fashion):
    file = fashion / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1] + b"\x04"))
    assert refusal(FashionMNISTSpec(root=str(fashion))) == (
        f"{file}: not the published Fashion-MNIST file (its md5 differs); fetch it again"
    )


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "bad header", "bad stream", "empty"])
def test_fashion_mnist_with_a_damaged_file(damage, fashion):
    file = fashion / "train-images-idx3-ubyte.gz"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    damaged = {
        "truncated": content[:middle],
        "not gzip": b"<html>",
        "bad header": content[:2] + b"\xff" + content[3:],
        "bad stream": content[:middle] + bytes(40) + content[middle + 40 :],
        "empty": b"",
    }[damage]
    file.write_bytes(damaged)
    assert refusal(FashionMNISTSpec(root=str(fashion))).startswith(f"{file}: ")


def test_fashion_mnist_with_a_missing_file(fashion):
    file = fashion / "t10k-images-idx3-ubyte.gz"
    file.unlink()
    assert refusal(FashionMNISTSpec(root=str(fashion))) == f"{file}: missing; put all four files of Fashion-MNIST there"


@pytest.mark.skipif(not named.DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist():
    source = FashionMNISTSpec().open()
    assert source.columns["input"].column.row_shape == (1, 28, 28)
    assert {pool: sum(part.rows for part in parts) for pool, parts in source.pools.items()} == {
        "train": 60_000,
        "test": 10_000,
    }
    loaded = source.load(source.pools["test"][0])
    assert np.bincount(loaded["target"].values).tolist() == [1000] * 10
    # that of all test pixels, published as 0.2868
    assert loaded["input"].values.mean() == pytest.approx(73.1466, abs=1e-4)


@pytest.mark.parametrize(
    ("spec", "name"), [(MNISTSpec, "MNIST"), (CIFAR10Spec, "CIFAR10"), (FashionMNISTSpec, "FashionMNIST")]
)
def test_no_network_is_said_with_the_path_and_the_fix(spec, name, tmp_path, monkeypatch):
    from torchvision import datasets

    def unreachable(*_, **__):
        raise RuntimeError(f"Error downloading {name}\nno route to host")

    monkeypatch.setattr(datasets, name, unreachable)
    message = refusal(spec(root=str(tmp_path)))
    assert message.startswith(f"data.root: {name} is neither in {tmp_path} nor could it be downloaded (")
    assert message.endswith("; put the files there or give another data.root")


@pytest.mark.parametrize("spec", [MNISTSpec, CIFAR10Spec, FashionMNISTSpec])
def test_a_root_that_is_not_there(spec, tmp_path):
    assert f"data.root: {tmp_path}/nowhere: no such folder" in refusal(spec(root=str(tmp_path / "nowhere")))


def test_mnist_and_cifar10_as_torchvision_hands_them_over(tmp_path, monkeypatch):
    import torch
    from torchvision import datasets

    class MNIST:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), True)
            rows = 40 if train else 10
            self.data = torch.arange(rows * 784).reshape(rows, 28, 28).to(torch.uint8)
            self.targets = torch.arange(rows) % 10

    class CIFAR10:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            rows = 40 if train else 10
            self.data = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
            self.targets = [row % 10 for row in range(rows)]

    monkeypatch.setattr(datasets, "MNIST", MNIST)
    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    named._read.cache_clear()
    mnist, cifar = (prepared(spec(root=str(tmp_path))) for spec in (MNISTSpec, CIFAR10Spec))
    named._read.cache_clear()
    assert mnist.manifest.signature.input_shape == (1, 28, 28)
    np.testing.assert_array_equal(
        made.split_rows(mnist, "test").columns["input"].values[:, 0], MNIST(str(tmp_path), False, True).data.numpy()
    )
    assert cifar.manifest.signature.input_shape == (3, 32, 32)
    assert cifar.manifest.class_names[3] == "cat"
    theirs = CIFAR10(str(tmp_path), False, True)
    rows = made.split_rows(cifar, "test")
    np.testing.assert_array_equal(rows.columns["input"].values[:, 2], theirs.data[..., 2])  # channels first
    assert rows.columns["target"].values.tolist() == theirs.targets


# -- image_folder ----------------------------------------------------------------------------------------------------


def draw(file: Path, *, size=(5, 6), colour=(10, 20, 30), mode="RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).convert(mode).save(file)


@pytest.fixture
def animals(tmp_path) -> Path:
    """ROOT/cat and ROOT/dog, five pictures each, and what else lies about in folders."""
    root = tmp_path / "my animals"
    for number in range(5):
        draw(root / "cat" / f"{number}.png", colour=(number, 0, 0))
        draw(root / "dog" / "sub folder" / f"{number}.JPG", colour=(200, 200, 200))
    (root / "README.txt").write_text("my animals")
    (root / "cat" / "Thumbs.db").write_text("")
    (root / "cat" / "._0.png").write_text("macOS's notes")
    (root / ".git" / "cat").mkdir(parents=True)
    draw(root / "aaa.png", size=(100, 100))  # not in a class folder
    return root


def test_a_folder_for_each_class(animals):
    data = prepared(ImageFolderSpec(path=str(animals), validation_fraction=0, test_fraction=0.2))
    assert data.manifest.class_names == ("cat", "dog")
    assert data.manifest.signature.input_shape == (3, 5, 6)
    rows = [made.split_rows(data, split) for split in ("train", "test")]
    found = sorted(
        (int(label), *image[:, 0, 0].tolist())
        for r in rows
        for label, image in zip(r.columns["target"].values, r.columns["input"].values, strict=True)
    )
    assert found == [(0, number, 0, 0) for number in range(5)] + [(1, 200, 200, 200)] * 5


def test_grey_pictures(animals):
    data = prepared(ImageFolderSpec(path=str(animals), channels=1, test_fraction=0.2))
    assert data.manifest.signature.input_shape == (1, 5, 6)
    assert 200 in made.split_rows(data, "train").columns["input"].values


def test_train_and_test_folders(tmp_path):
    for number in range(4):
        for name in ("a", "b"):
            draw(tmp_path / "train" / name / f"{number}.png", colour=(number, 0, 0))
            draw(tmp_path / "test" / name / f"{number}.png", colour=(100 + number, 0, 0))
    data = prepared(ImageFolderSpec(path=str(tmp_path), validation_fraction=0.25))
    assert {split: data.manifest.rows(split) for split in data.manifest.splits} == {
        "train": 6,
        "validation": 2,
        "test": 8,
    }
    assert made.split_rows(data, "test").columns["input"].values[:, 0].min() == 100


def test_a_class_that_only_the_test_folder_has(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/bb/1.png"):
        draw(tmp_path / name)
    assert f"{tmp_path}/test/bb: a class without training images" in refusal(ImageFolderSpec(path=str(tmp_path)))


def test_a_class_folder_without_images(animals):
    (animals / "cow").mkdir()
    (animals / "cow" / "notes.txt").write_text("none yet")
    assert refusal(ImageFolderSpec(path=str(animals))) == (
        f"{animals}/cow: no images in this class folder; add some or remove it"
    )


@pytest.mark.parametrize("what", ["missing", "a file", "empty"])
def test_no_folder(what, tmp_path):
    path = tmp_path / "there"
    if what == "a file":
        path.write_text("")
    if what == "empty":
        path.mkdir()
    assert f"data.path: {path}" in refusal(ImageFolderSpec(path=str(path)))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_picture_is_named(damage, animals):
    file = animals / "cat" / "3.png"
    file.write_bytes({"truncated": file.read_bytes()[:50], "text": b"<html>", "empty": b""}[damage])
    message = refusal(ImageFolderSpec(path=str(animals)))
    assert message.startswith(f"{file}: ")
    assert message.endswith("; replace or remove it")


def test_pictures_of_different_sizes_need_an_image_size(animals):
    draw(animals / "dog" / "large.png", size=(9, 12))
    assert refusal(ImageFolderSpec(path=str(animals))) == (
        f"{animals}/dog/large.png: 9x12 pixels where the first image has 5x6; set data.image_size to resize them all"
    )
    data = prepared(ImageFolderSpec(path=str(animals), image_size=(4, 7)))
    assert data.manifest.signature.input_shape == (3, 4, 7)


def test_pictures_in_palette_or_with_transparency_or_one_bit(tmp_path):
    for name, mode in (("a", "P"), ("b", "RGBA"), ("c", "1"), ("d", "L"), ("e", "CMYK")):
        ending = "tif" if mode == "CMYK" else "png"
        draw(tmp_path / name / f"1.{ending}", mode=mode, colour=(255, 255, 255))
    source = ImageFolderSpec(path=str(tmp_path)).open()
    assert (source.load(source.pools["train"][0])["input"].values == 255).all()


def test_pictures_of_sixteen_bits_are_refused(tmp_path):
    draw(tmp_path / "b" / "1.png")
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((5, 6), 4000, np.uint16)).save(tmp_path / "a" / "1.png")
    message = refusal(ImageFolderSpec(path=str(tmp_path)))
    assert message == f"{tmp_path}/a/1.png: pixels of more than 8 bits (mode I;16); convert the images to 8 bits"


def test_links_are_followed(animals, tmp_path):
    root = tmp_path / "links"
    root.mkdir()
    (root / "cat").symlink_to(animals / "cat")
    draw(root / "cow" / "1.png")
    (root / "cow" / "2.png").symlink_to(animals / "cat" / "1.png")
    source = ImageFolderSpec(path=str(root)).open()
    assert sum(part.rows for part in source.pools["train"]) == 7


def test_a_uri_of_images(animals):
    spec = ImageFolderSpec(path="file://" + str(animals).replace(" ", "%20"))
    assert prepared(spec).manifest.rows("train") == 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_no_damage_to_a_picture_is_a_traceback(kind):
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, kind)
    for _ in range(100):
        content = bytearray(buffer.getvalue())
        content[generator.integers(len(content))] = generator.integers(256)
        said = "picture: "
        try:
            decode_image(bytes(content), name="picture", channels=3, size=None)
        except UserError as error:
            said = str(error)
        assert said.startswith("picture: ")
