"""predict: what a run's best model says of a text, or of a tree, node by node, from RUN/model alone."""

from dataclasses import dataclass
from typing import cast

import pyarrow as pa
import torch

from cluster.data.sources.flat_trees import FlatTree
from cluster.inference.predictions import Predicting, opened_predictor
from cluster.runs.given_files import GivenTexts
from cluster.runs.given_tables import INPUT
from cluster.runs.given_trees import is_tree, read_tree
from cluster.runs.opened import Parser, open_model
from cluster.runs.predictor import Predictor
from nn_models.columns import Labels, Tokens, Tree
from nn_models.errors import UserError
from nn_models.evidence import confidence


@dataclass(frozen=True)
class PredictedTree:
    """A tree with what is predicted of its nodes: their classes and the probabilities of these, None for no class."""

    tree: FlatTree
    labels: list[str | None]
    confidences: list[float | None]


def predict_text(
    run: str, text: str, *, parser: str | None = None, top: int = 5, device: torch.device | None = None
) -> "PredictedTree | pa.Table":
    """A tree with what is said of its nodes, where the run's model reads trees; else the row that is said of a text.

    Of a language model that is the token that follows the text. Raises UserError where the model reads no text.
    """
    model = open_model(run, device=device)
    column = model.manifest.columns[INPUT].column
    if isinstance(column, Tree):
        return predict_tree(run, text, parser=parser, device=device)
    model = opened_predictor(run, device=device)
    if not isinstance(column, Tokens):
        what = f"its model reads no text (input: {column.describe()})"
        raise UserError(run, what, "name a file of rows in the place of --text")
    if parser is not None:
        raise UserError("--parser", "the model reads texts, and no trees", "leave it out")
    if not column.unit:
        raise UserError(run, "its model reads numbers of words that have no names", "give a file with lists of them")
    if not text:
        raise UserError("--text", "no text", "give some")
    texts = GivenTexts([text], {INPUT: model.manifest.columns[INPUT]}, model.recipe.data.file_columns, path="--text")
    (found,) = Predicting(model, texts, top=top, gather=False).found(texts.parts[0])
    return found.table


def predict_tree(
    run: str, text: str, *, parser: str | None = None, device: torch.device | None = None
) -> PredictedTree:
    """The tree of a text, and what the run's model says of its nodes, or of its root where only that was learned.

    The text is a tree in brackets, `((It works) .)`, or a sentence, whose tree the run `parser` finds; a parser's own
    run finds the tree alone. Raises UserError where there is no such model, or the text is no tree.
    """
    model = open_model(run, device=device)
    if isinstance(model, Parser):
        if parser is not None:
            raise UserError("--parser", f"{run} is a parser itself", "leave it out")
        tree = model.parse(text, path="--text")
        return PredictedTree(tree, tree.labels, [None] * len(tree.words))
    signature = model.manifest.signature
    if not isinstance(model, Predictor) or not isinstance(signature["input"], Tree) or not model.classes:
        what = signature["input"].describe()
        raise UserError(run, f"its model predicts no classes of trees (input: {what})", "give the run of a tree model")
    if is_tree(text):
        if parser is not None and "(" in text:
            raise UserError("--parser", "the text is a tree already", "leave it out, or the brackets")
        tree = read_tree(text, path="--text")
    elif parser is None:
        fix = "put it in brackets, such as ((It works) .), or name the run of a parser with --parser"
        raise UserError("--text", "a sentence, where the model reads trees" if text.strip() else "no words", fix)
    else:
        tree = _parsed(parser, text, device)
    predictions, sure = (values.tolist() for values in confidence(model([tree])))
    labels = [model.classes[number] for number in predictions]
    if isinstance(signature["target"], Labels):
        return PredictedTree(tree, cast(list[str | None], labels), sure)
    none = [None] * (len(tree.words) - 1)
    return PredictedTree(tree, [*none, *labels], [*none, *sure])


def _parsed(run: str, text: str, device: torch.device | None) -> FlatTree:
    model = open_model(run, device=device)
    if not isinstance(model, Parser):
        raise UserError("--parser", f"{run} has a {model.recipe.model.kind}, which parses nothing", "give a parser's")
    return model.parse(text, path="--text")
