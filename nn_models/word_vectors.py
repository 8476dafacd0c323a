"""Word vectors: an embedding that begins with what was learned elsewhere, such as GloVe's (Pennington et al. 2014)."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nn_models.errors import UserError
from nn_models.model import ModelSpec
from nn_models.signature import Signature
from nn_models.spec import invalid


class WantedVectors(NamedTuple):
    """What whoever trains is to look for in a file of the user's: vectors of `size` numbers for words by their names.

    `field` is the one that says which file, `size_field` the one that says their size.
    """

    field: str
    path: str
    words: Sequence[str]
    size: int
    size_field: str


class _Embeds(Protocol):
    @property
    def embedding(self) -> nn.Embedding | None: ...


class WordVectorsSpec(ModelSpec):
    """Base of the descriptions of models that embed words: modules with an `embedding`, a row a word."""

    files: ClassVar[tuple[str, ...]] = ("vectors",)
    vector_size: ClassVar[str] = "embedding"  # the field that says how many numbers stand for a word
    vectors: str | None = Field(
        None, min_length=1, description="file of word vectors that the embedding begins with: text (GloVe), safetensors"
    )
    freeze_vectors: bool = Field(False, description="leave the embedding as it begins")

    @model_validator(mode="after")
    def _vectors_to_freeze(self) -> "WordVectorsSpec":
        if self.freeze_vectors and self.vectors is None:
            raise invalid("there are no vectors", "name their file in vectors", field="freeze_vectors")
        return self

    def check(self, signature: Signature) -> None:
        """See ModelSpec."""
        super().check(signature)
        if self.vectors is not None and not signature["input"].vocabulary:
            raise UserError("model.vectors", "the input has no words by name", "leave it out, or choose texts")

    def wanted_vectors(self, signature: Signature) -> WantedVectors | None:
        """See ModelSpec."""
        if self.vectors is None:
            return None
        words, size = signature["input"].vocabulary, getattr(self, self.vector_size)
        return WantedVectors("vectors", self.vectors, words, size, self.vector_size)

    def take_vectors(self, model: Any, words: Tensor, vectors: Tensor) -> None:
        """See ModelSpec."""
        embedding = model.embedding
        with torch.no_grad():
            embedding.weight[words.to(embedding.weight.device)] = vectors.to(embedding.weight)

    def settle(self, model: _Embeds) -> None:
        """To be called of each module that is built: its embedding is frozen where that is asked for."""
        if self.freeze_vectors and model.embedding is not None:
            model.embedding.weight.requires_grad_(False)
