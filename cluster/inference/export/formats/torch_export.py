"""torch-export: a file of torch.export, which PyTorch runs, compiles and lowers without the code of the net."""

import io
import json
from collections.abc import Mapping

import torch

from cluster.inference.export.formats.base import Computes, Format, Rows, exported
from cluster.inference.export.graph import Graph

METADATA = "manta.json"


def _written(graph: Graph, rows: Rows, metadata: Mapping[str, str]) -> bytes:
    program, buffer = exported(graph, rows), io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(dict(metadata))})
    return buffer.getvalue()


def _opened(content: bytes, graph: Graph) -> Computes:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda rows: list(module(*rows))


TORCH_EXPORT = Format("torch-export", (".pt2",), "a .pt2 file", (), _written, _opened)
