"""The formats of files that hold a graph, by the name that people give them."""

from cluster.inference.export.formats.base import Format
from cluster.inference.export.formats.onnx import ONNX
from cluster.inference.export.formats.torch_export import TORCH_EXPORT
from cluster.inference.export.formats.torchscript import TORCHSCRIPT

FORMATS: dict[str, Format] = {format.name: format for format in (ONNX, TORCH_EXPORT, TORCHSCRIPT)}
HUB = "safetensors-hub"  # a folder, with weights and no graph
