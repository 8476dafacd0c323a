"""The zoo: THE lists, of models and of objectives, and the way from a Spec to a module."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import Field
from torch import nn

from nn_models.adversarial import ConditionalGANSpec, DCGANSpec, GANSpec
from nn_models.adversarial_losses import AdversarialObjectiveSpec
from nn_models.autoencoder import AutoencoderSpec, ConvAutoencoderSpec
from nn_models.classification import ClassificationSpec
from nn_models.contractive import ContractiveSpec
from nn_models.convolutional import AlexNetSpec, CNNSpec
from nn_models.custom import CustomSpec
from nn_models.denoising import DenoisingSpec
from nn_models.feedforward import MLPSpec
from nn_models.forecasting import ForecastSpec
from nn_models.labelled_parser import LabelledParserSpec, LabelledParsingSpec
from nn_models.metrics import Metric
from nn_models.model import ModelSpec
from nn_models.objectives import ObjectiveSpec
from nn_models.parser import ParserSpec
from nn_models.parser_objective import ParsingSpec
from nn_models.pix2pix import Pix2PixSpec
from nn_models.reconstruction import ReconstructionSpec
from nn_models.recurrent import GRUSpec, LSTMSpec, PeepholeLSTMSpec, RNNSpec
from nn_models.recursive import ChildSumTreeLSTMSpec, RecursiveSpec, RNTNSpec, TreeLSTMSpec
from nn_models.regression import RegressionSpec
from nn_models.scene_objective import SceneParsingSpec
from nn_models.scene_parser import SceneParserSpec
from nn_models.sequence_autoencoder import SequenceAutoencoderSpec
from nn_models.sequence_objectives import NextTokenSpec, StepLabelsSpec
from nn_models.signature import Signature
from nn_models.sparse import SparseSpec
from nn_models.spec import validate
from nn_models.tree_objectives import NodeLabelsSpec
from nn_models.variational import ConditionalVAESpec, VAESpec
from nn_models.variational_objective import VariationalSpec

AnyModelSpec = Annotated[
    MLPSpec
    | CNNSpec
    | AlexNetSpec
    | RNNSpec
    | LSTMSpec
    | PeepholeLSTMSpec
    | GRUSpec
    | AutoencoderSpec
    | ConvAutoencoderSpec
    | SequenceAutoencoderSpec
    | VAESpec
    | ConditionalVAESpec
    | RecursiveSpec
    | RNTNSpec
    | TreeLSTMSpec
    | ChildSumTreeLSTMSpec
    | ParserSpec
    | LabelledParserSpec
    | SceneParserSpec
    | GANSpec
    | DCGANSpec
    | ConditionalGANSpec
    | Pix2PixSpec
    | CustomSpec,
    Field(discriminator="kind"),
]

AnyObjectiveSpec = Annotated[
    ClassificationSpec
    | ForecastSpec
    | RegressionSpec
    | StepLabelsSpec
    | NextTokenSpec
    | ReconstructionSpec
    | SparseSpec
    | DenoisingSpec
    | ContractiveSpec
    | VariationalSpec
    | NodeLabelsSpec
    | ParsingSpec
    | LabelledParsingSpec
    | SceneParsingSpec
    | AdversarialObjectiveSpec,
    Field(discriminator="kind"),
]

MODELS: dict[str, type[ModelSpec]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(get_args(AnyModelSpec)[0])
}
OBJECTIVES: dict[str, type[ObjectiveSpec]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(get_args(AnyObjectiveSpec)[0])
}
# Every metric that an objective declares, by its name.
METRICS: dict[str, Metric] = {
    metric.name: metric for objective in OBJECTIVES.values() for metric in objective.known_metrics()
}


def build(model: Mapping[str, Any] | ModelSpec, signature: Signature) -> nn.Module:
    """The module that `model` describes, for rows such as `signature` says, initialised from torch's global generator.

    An adversarial model comes as `adversarial.Halves`, with its `generator` and its `discriminator`.
    Raises UserError where the description is wrong, or where the model cannot read such rows.
    """
    spec: ModelSpec = model if isinstance(model, ModelSpec) else validate(AnyModelSpec, model, prefix="model")
    spec.check(signature)
    return spec.build(signature)
