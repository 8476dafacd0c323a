"""torchscript: a traced module, which libtorch runs in C++; PyTorch keeps the format and develops it no more."""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from cluster.inference.export.formats.base import Computes, Format, Rows, cannot_follow
from cluster.inference.export.formats.torch_export import METADATA
from cluster.inference.export.graph import Graph


def _written(graph: Graph, rows: Rows, metadata: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    try:
        with _without_warnings(), torch.no_grad():
            traced = torch.jit.trace(graph, tuple(rows), check_trace=False)  # the file itself is checked, on other rows
            torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(dict(metadata))})
    except Exception as error:  # of many kinds: what a user's own module does is not known
        raise cannot_follow("torch.jit.trace", error) from error
    return buffer.getvalue()


def _opened(content: bytes, graph: Graph) -> Computes:
    with _without_warnings():
        module = torch.jit.load(io.BytesIO(content))
    return lambda rows: list(module(*rows))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """That the format is deprecated, and that a trace keeps what Python has computed of shapes, is known."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", kind)
        yield


TORCHSCRIPT = Format("torchscript", (".pt", ".ts"), "a .pt file", (), _written, _opened)
