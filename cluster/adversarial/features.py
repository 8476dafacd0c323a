"""Features: rows as a classifier of the same data sees them, which is what the quality monitor compares them by."""

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cluster.data.cache import cache_root
from cluster.data.manifest import MANIFEST, Manifest
from cluster.data.shards import DataSet, some_rows, write_shard
from cluster.data.sources.prepared import ShardsSpec
from cluster.errors import StorageFailed
from cluster.recipe.loading import dump_recipe
from cluster.recipe.optimizers import AdamWSpec, CosineSpec
from cluster.recipe.recipe import Recipe, TrainSpec
from cluster.storage import Folder
from cluster.training.checkpoints import read_model, restore_model, save_model
from cluster.training.context import LocalContext
from cluster.training.loop import fit
from cluster.training.run_directory import RECIPE, RunDirectory
from cluster.training.splits import Splits, open_splits
from nn_models.adversarial import num_halvings
from nn_models.adversarial_losses import has_classes
from nn_models.columns import Image
from nn_models.convolutional import CNN, CNNSpec
from nn_models.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 2  # of the folder's name and the cache's key: raise it when another classifier is trained
FOLDER = f"features-{FORMAT}"  # in the data set's, with a `model` in it as in a run's
WEIGHTS = "model/model.safetensors"

# Training sees so many pixels: 3 epochs of Fashion-MNIST, a minute and a half on one core. Rows of which not all could
# be seen twice are left out, and small sets are seen often.
PIXELS = 130_000_000
EPOCHS = (2, 30)  # fewest and most


class Features(nn.Module):
    """Rows as the quality monitor compares them, as (B, F) float32, without gradients.

    F numbers of an image are what a classifier's last layer reads, after its rectifiers. As with the Inception
    features of Heusel et al. 2017, a distance between such numbers is one of content rather than of pixels. Feature
    vectors, which generators make standardised, are their own features.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, manifest: Manifest, classifier: CNN | None = None) -> None:
        """`manifest` has the classifier's normalisation; there is none for feature vectors."""
        super().__init__()
        self.classifier = classifier
        inputs = manifest.columns["input"]
        size = inputs.column.row_shape[0]
        self.num_features: int = size if classifier is None else classifier.dense.output.in_features
        # (y + 1) / 2 is what the classifier's mean and std refer to: its input is ((y + 1) / 2 - mean) / std
        moments = torch.tensor([inputs.mean, inputs.std], dtype=torch.float64)
        mean, std = moments[:, :, None, None]
        self.register_buffer("scale", (0.5 / std).float())
        self.register_buffer("shift", ((0.5 - mean) / std).float())
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        return self.scale.device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> (B, F); standardised vectors (B, D) stay as they are."""
        if self.classifier is None:
            return images
        return self.classifier.dense.hidden(self.classifier.blocks(images * self.scale + self.shift).flatten(1))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> (B, K)."""
        assert self.classifier is not None
        return self.classifier.dense.output(self(images))

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the likeliest labels (B,)."""
        return self.logits(images).argmax(1)


def open_features(
    data: DataSet, *, device: torch.device | None = None, train: TrainSpec | None = None
) -> Features | None:
    """The features of a data set, whose classifier is trained first, in this process, where it is not stored yet.

    It is stored beside the data, or in the cache where nothing can be written there. Several processes may do this at
    once: the classifier that is there first is everyone's. `train` says how to train it, by default as long as its
    accuracy needs. None for images that are not of at least two classes: no classifier can be trained on them.

    Raises UserError where a stored classifier is damaged or was trained on other data.
    """
    device = device or torch.device("cpu")
    manifest, signature = data.manifest, data.manifest.signature
    if not isinstance(signature["input"], Image):
        return Features(manifest).to(device)
    if not has_classes(signature):
        return None
    recipe = classifier_recipe(data, train)
    place = _place(data, recipe)
    # weights are drawn, and `fit` seeds the process's generator
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if not place.exists(WEIGHTS):
            weights = _trained(data, recipe, device)
            if not place.exists(WEIGHTS):  # or another process was first
                place.write_bytes(WEIGHTS, weights)
        return _restored(place, manifest).to(device)


def classifier_recipe(data: DataSet, train: TrainSpec | None = None) -> Recipe:
    """How the classifier of a data set of images is trained."""
    manifest = data.manifest
    _, height, width = manifest.signature.input_shape
    fewest, most = EPOCHS
    epochs = PIXELS // (manifest.rows("train") * height * width)
    return Recipe(
        name=FOLDER,
        model=CNNSpec(
            channels=tuple(16 << level for level in range(num_halvings(height, width))),
            pool=2 if min(height, width) >= 4 else 1,
            activation="leaky_relu",  # with relu half of the features of Fashion-MNIST are always 0
            batch_norm=True,
            hidden=(64,),  # few: a covariance of F features needs more rows than F
            dropout=0.25,
        ),
        data=ShardsSpec(path=data.folder.uri),
        optimizer=AdamWSpec(lr=2e-3),
        schedule=CosineSpec(warmup_steps=20),
        train=train or TrainSpec(epochs=min(max(epochs, fewest), most), global_batch_size=64 if epochs > most else 128),
    )


def _place(data: DataSet, recipe: Recipe) -> Folder:
    """Where the classifier is, or can be written: its recipe is written before the minute of training."""
    beside = data.folder / FOLDER
    if beside.exists(WEIGHTS):
        return beside
    try:
        beside.write_text(f"model/{RECIPE}", dump_recipe(recipe))
        return beside
    except (UserError, StorageFailed) as error:
        identity = f"{FORMAT} {data.manifest.model_dump_json(exclude_none=True)}"
        elsewhere = Folder(cache_root() / FOLDER / hashlib.sha256(identity.encode()).hexdigest()[:16])
        logger.debug("%s cannot be written (%s); the classifier is kept in %s", beside, error, elsewhere)
    if not elsewhere.exists(WEIGHTS):
        elsewhere.write_text(f"model/{RECIPE}", dump_recipe(recipe))
    return elsewhere


def _trained(data: DataSet, recipe: Recipe, device: torch.device) -> bytes:
    """The weights' file of a newly trained classifier."""
    logger.info(
        "training a classifier on %s, which the quality of what is made will be measured by; this is done once, and "
        "takes a while (%d epochs)",
        data.folder,
        recipe.train.epochs,
    )
    with tempfile.TemporaryDirectory(prefix="manta-") as folder:
        run = Folder(folder)
        with _float64():
            outcome = fit(recipe, context=_Float64Context(run=run, splits=_splits(data, run / "data"), device=device))
        best, saved = outcome["best"], read_model(run)
        logger.info("the classifier is trained: %s %.1f %%", best["metric"], 100 * best["value"])
        weights = {name: value.float() if value.is_floating_point() else value for name, value in saved.weights.items()}
        save_model(run, weights, best=saved.best, manifest=saved.manifest)
        return run.read_bytes(WEIGHTS)


class _Float64Context(LocalContext):
    """Trains in float64. How sums are rounded depends on the processor and on the number of threads.

    Training makes much more of it: with float32 the digits' floor was from 2.33 to 2.39 by threads and instructions,
    and so it is the same in seven digits. On processors where torch draws other masks of dropout it is another one.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        """See Context: the model takes rows of float32."""
        model.register_forward_pre_hook(lambda _, inputs: tuple(rows.double() for rows in inputs))
        return super().prepare(model)


@contextmanager
def _float64() -> Iterator[None]:
    """New weights are drawn in float64: of float32 ones the last digit depends on the processor, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _splits(data: DataSet, excerpt: Folder) -> Splits:
    """The rows to train the classifier on, and to choose its best weights by: some of them where there are many."""
    _, height, width = data.manifest.signature.input_shape
    most = PIXELS // EPOCHS[0] // (height * width)
    wanted = {"train": most, "validation": most // 10}
    if any(data.manifest.rows(split) > rows for split, rows in wanted.items()):
        shards = {
            split: (write_shard(excerpt, f"{split}.parquet", some_rows(data, split, rows), data.manifest.columns),)
            for split, rows in wanted.items()
            if data.manifest.rows(split)
        }
        excerpt.write_text(MANIFEST, data.manifest.model_copy(update={"splits": shards}).model_dump_json())
        data = DataSet(excerpt)
    splits = open_splits(data, window=None)
    tables = {split: table for split, table in splits.tables.items() if split in wanted}
    return Splits(splits.manifest, splits.where, tables)


def _restored(place: Folder, manifest: Manifest) -> Features:
    """The stored classifier. Raises UserError where it is damaged or of other data."""
    fix = f"delete {place} to have it trained anew"
    try:
        model, saved = restore_model(place, RunDirectory(place).recipe(f"model/{RECIPE}"))
    except UserError as error:
        raise UserError(str(place), f"the classifier in here cannot be used ({error})", fix) from None
    if saved.manifest != manifest.model_copy(update={"splits": {}}) or not isinstance(model, CNN):
        raise UserError(str(place), "the classifier in here was trained on other data", fix)
    return Features(saved.manifest, model)
