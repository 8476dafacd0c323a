"""Manifests without rows: of data sets that might have to be downloaded, or are the user's own."""

from cluster.data.manifest import Manifest
from nn_models.spec import validate


def manifest(shape=(4,), *, target_kind="label", num_outputs=3, dtype="float32", rows=100, **more) -> Manifest:
    shard = {"file": "a", "rows": rows, "row_groups": [rows], "bytes": 1, "sha256": ""}
    return validate(
        Manifest,
        {
            "source": "made",
            "input_shape": shape,
            "input_dtype": dtype,
            "target_kind": target_kind,
            "num_outputs": num_outputs,
            "class_names": [str(name) for name in range(num_outputs)] if target_kind == "label" else [],
            "mean": [0.0] * shape[0],
            "std": [1.0] * shape[0],
            "splits": {"train": [shard], "validation": [shard]} if rows > 0 else {},
            **more,
        },
    )


def treebank() -> Manifest:
    """As the Stanford Sentiment Treebank is prepared."""
    shard = {"file": "a", "rows": 8544, "row_groups": [8544], "bytes": 1, "sha256": ""}
    tree = {"kind": "tree", "size": 21_701, "known": 18_280}
    columns = {
        "input": {"column": tree, "elements": 37.3},
        "target": {"column": {"kind": "labels", "size": 5}, "dtype": "int32", "elements": 37.3},
    }
    return validate(
        Manifest, {"source": "sst", "columns": columns, "splits": {"train": [shard], "validation": [shard]}}
    )


# of the data sets that might have to be downloaded, or are the user's own
SHAPES = {
    "sst": treebank(),
    "fashion_mnist": manifest((1, 28, 28), num_outputs=10, dtype="uint8", rows=54_000),
    "cifar10": manifest((3, 32, 32), num_outputs=10, dtype="uint8", rows=45_000),
    "pairs": manifest((1, 28, 28), num_outputs=10, dtype="uint8", rows=54_000, condition_shape=(1, 28, 28)),
}
