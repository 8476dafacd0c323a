"""The explicit union of all data sections: THE list of sources."""

from typing import Annotated

from pydantic import Field

from cluster.data.sources.bundled import SklearnSpec
from cluster.data.sources.docstrings import DocstringsSpec
from cluster.data.sources.image_folder import ImageFolderSpec
from cluster.data.sources.images import CIFAR10Spec, DigitsSpec, FashionMNISTSpec, MNISTSpec
from cluster.data.sources.listops import ListOpsSpec
from cluster.data.sources.memory import AddingSpec, CopySpec
from cluster.data.sources.pairs import PairsSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.sources.prepared import ShardsSpec
from cluster.data.sources.scene_files import SceneFilesSpec
from cluster.data.sources.scenes import ScenesSpec
from cluster.data.sources.series import ElNinoSpec, SeriesSpec
from cluster.data.sources.text import PythonDocsSpec, TextSpec
from cluster.data.sources.text_files import SequenceLabellingSpec, TextClassificationSpec
from cluster.data.sources.treebank import SSTSpec
from cluster.data.sources.trees import TreesSpec

AnyDataSpec = Annotated[
    DigitsSpec
    | FashionMNISTSpec
    | MNISTSpec
    | CIFAR10Spec
    | SklearnSpec
    | ImageFolderSpec
    | ParquetSpec
    | PairsSpec
    | TextSpec
    | PythonDocsSpec
    | SeriesSpec
    | ElNinoSpec
    | DocstringsSpec
    | TextClassificationSpec
    | SequenceLabellingSpec
    | AddingSpec
    | CopySpec
    | SSTSpec
    | ListOpsSpec
    | TreesSpec
    | ScenesSpec
    | SceneFilesSpec
    | ShardsSpec,
    Field(discriminator="kind"),
]
