"""Ray Data has registered a type whose values are unpickled: no worker and no conversion reads one."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cluster
from cluster.data.conversion import ray_mapper
from cluster.data.prepare import prepare
from cluster.data.sources.images import DigitsSpec
from cluster.storage import Folder
from nn_models import UserError
from tests.ray.conftest import EXACT
from tests.unit import made
from tests.unit.pickled import extended, objects, replace, with_column

TYPE = "ray.data.arrow_pickled_object"


def test_a_worker_that_streams_pickled_rows_refuses_them(ray, tmp_path):
    data, mark = tmp_path / "data", tmp_path / "code-ran"
    prepare(DigitsSpec(), Folder(data))

    def pickled(table: pa.Table) -> pa.Table:
        return with_column(table, extended("row", pa.large_binary(), TYPE), objects(mark, len(table)))

    file = replace(data, "train", pickled)  # which the driver does not read: it holds the other splits only
    recipe = {**EXACT, "data": {"kind": "shards", "path": str(data), "shuffle_window": 200}}
    with pytest.raises(UserError, match=f"{file}: the shard holds the extension type {TYPE} in column row"):
        cluster.train(recipe, num_workers=1, run=str(tmp_path / "run"))
    assert not mark.exists()


def test_a_conversion_refuses_pickled_columns(ray, tmp_path):
    spec, mark = made.features(tmp_path / "in", 60), tmp_path / "code-ran"
    mapper = ray_mapper(ray)

    def replaced(function, slots):  # after the driver has looked at it
        table = pq.read_table(spec.path)
        table = with_column(table, extended("y", pa.large_binary(), TYPE), objects(mark, len(table)))
        pq.write_table(table, spec.path)
        return mapper(function, slots)

    with pytest.raises(UserError, match=f"column y is of the extension type {TYPE}"):
        prepare(spec, Folder(tmp_path / "out"), mapper=replaced)
    assert not mark.exists()
