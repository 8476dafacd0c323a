"""onnx: one file that ONNX Runtime and many others compute, without Python or PyTorch."""

from collections.abc import Mapping

import torch

from cluster.inference.export.formats.base import Computes, Format, Rows, cannot_follow, exported, quiet
from cluster.inference.export.graph import ELSE, Graph
from nn_models.errors import UserError

MOST_BYTES = 2**31 - 2**20  # that one message of protobuf holds, less what is no weight


def _written(graph: Graph, rows: Rows, metadata: Mapping[str, str]) -> bytes:
    size = sum(weight.nbytes for weight in graph.state_dict().values())
    if size > MOST_BYTES:
        raise UserError("--format", f"weights of {size / 1e9:.1f} GB, where an ONNX file holds at most 2", ELSE)
    program = exported(graph, rows)
    try:
        with quiet():
            found = torch.onnx.export(
                program,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in graph.outputs],
                dynamic_shapes={port.name: {0: "rows"} for port in graph.inputs},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.onnx has several, with its own advice to its developers
        raise cannot_follow(
            "torch.onnx", error.__cause__ if isinstance(error.__cause__, Exception) else error
        ) from None
    assert found is not None
    found.model.metadata_props.update(metadata)
    content: bytes = found.model_proto.SerializeToString()
    return content


def _opened(content: bytes, graph: Graph) -> Computes:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # of its warnings none is about what it computes
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in graph.outputs]

    def computed(rows: Rows) -> list[torch.Tensor]:
        given = {port.name: values.numpy() for port, values in zip(graph.inputs, rows, strict=True)}
        return [torch.from_numpy(values) for values in session.run(names, given)]

    return computed


ONNX = Format("onnx", (".onnx",), "an ONNX file", ("onnx", "onnxscript", "onnxruntime"), _written, _opened)
