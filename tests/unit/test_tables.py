"""Tables: a Parquet file is data and never code: types before values, no extension types, no metadata."""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cluster
from cluster.data.prepare import prepare
from cluster.data.shards import DataSet
from cluster.data.sources.pairs import PairsSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.tables import ParquetFile, UnreadableError
from cluster.storage import Folder
from nn_models.errors import UserError
from tests.unit import made
from tests.unit.pickled import extended, objects, replace, with_column

pytestmark = pytest.mark.filterwarnings("error")

ROWS = 60
PICKLED = "manta.tests.pickled"


class Pickled(pa.ExtensionType):
    """Values that are unpickled when they are read, as those of Ray Data's type of objects are."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), PICKLED)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        if serialized:
            raise TypeError(f"not made for {serialized!r}")
        return cls()

    def __arrow_ext_class__(self):
        return PickledArray


class PickledArray(pa.ExtensionArray):
    def to_numpy(self, zero_copy_only=True, writable=False):
        return np.array([pickle.loads(value.as_py()) for value in self.storage])


@pytest.fixture(params=[True, False], ids=["registered", "not registered"])
def registered(request):
    """Whether this process knows the type, as a Ray worker knows Ray Data's."""
    if not request.param:
        yield False
        return
    pa.register_extension_type(Pickled())
    yield True
    pa.unregister_extension_type(PICKLED)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Path:
    """A prepared data set of features and labels."""
    made.written(made.features(tmp_path / "in", ROWS), tmp_path / "data")
    return tmp_path / "data"


def refusals(folder: Path, split: str = "train") -> set[str]:
    """What each way to read the split says."""
    data = DataSet(str(folder))
    ways = (data.verify, lambda: data.table(split), lambda: data.read_row_groups(data.row_group_locations(split)))
    said = set()
    for read in ways:
        with pytest.raises(UserError) as caught:
            read()
        said.add(str(caught.value))
    return said


def test_a_shard_of_pickled_objects_is_refused_before_one_is_read(shards, registered, tmp_path):
    mark = tmp_path / "code-ran"

    def pickled(table: pa.Table) -> pa.Table:
        return with_column(table, extended("row", pa.large_binary(), PICKLED), objects(mark, len(table)))

    file = replace(shards, "train", pickled)
    assert refusals(shards) == {
        f"{file}: the shard holds the extension type {PICKLED} in column row, which is not read; delete {shards} and "
        "prepare the data again"
    }
    with pytest.raises(UserError, match=f"{file}: the shard holds the extension type"):
        cluster.train(
            "digits-mlp", run=str(tmp_path / "run"), overrides={"data": {"kind": "shards", "path": str(shards)}}
        )
    assert not mark.exists()


@pytest.mark.parametrize("where", ["of the elements", "beside the columns", "whose class fails"])
def test_an_extension_type_anywhere_in_a_shard_is_refused(where, shards, tmp_path):
    pa.register_extension_type(Pickled())
    try:

        def change(table: pa.Table) -> pa.Table:
            if where == "beside the columns":
                return table.append_column(
                    extended("more", pa.large_binary(), PICKLED), objects(tmp_path / "mark", len(table))
                )
            if where == "whose class fails":
                return with_column(table, extended("row", pa.int64(), PICKLED, serialized="[1]"), table["row"])
            element = extended("element", pa.float32(), "some.other")
            values = pa.FixedSizeListArray.from_arrays(
                table["x" if "x" in table.column_names else "input"].combine_chunks().flatten(),
                type=pa.list_(element, 4),
            )
            return with_column(table, pa.field("input", values.type), values)

        file = replace(shards, "train", change)
        (said,) = refusals(shards)
    finally:
        pa.unregister_extension_type(PICKLED)
    assert said.startswith(f"{file}: the shard ")
    assert ("not made for b'[1]'" if where == "whose class fails" else "extension type") in said


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("row", pa.large_binary(), "holds large_binary in column row where manifest.json says int64"),
        ("target", pa.float64(), "holds double in column target where manifest.json says int64"),
        ("target", pa.string(), "holds string in column target where manifest.json says int64"),
        (
            "extra",
            pa.int64(),
            "holds the columns row, input, target, extra where manifest.json says row, input, target",
        ),
    ],
)
def test_types_are_compared_with_the_manifests(column, kind, message, shards):
    def change(table: pa.Table) -> pa.Table:
        if column not in table.column_names:
            return table.append_column(column, pa.array(range(len(table)), kind))
        values = [str(value) for value in table[column].to_pylist()]
        typed = [value.encode() for value in values] if pa.types.is_large_binary(kind) else values
        array = pa.array(typed, kind) if not pa.types.is_floating(kind) else pa.array(map(float, values), kind)
        return with_column(table, pa.field(column, kind), array)

    file = replace(shards, "train", change)
    assert refusals(shards) == {f"{file}: the shard {message}; delete {shards} and prepare the data again"}


def test_no_metadata_goes_on_with_the_rows(shards):
    tagged = {"tag": "1"}

    def change(table: pa.Table) -> pa.Table:
        element = pa.field("element", pa.float32(), metadata=tagged)
        values = pa.FixedSizeListArray.from_arrays(table["input"].combine_chunks().flatten(), type=pa.list_(element, 4))
        table = with_column(table, pa.field("input", values.type, metadata=tagged), values)
        return table.replace_schema_metadata({"pandas": "{}"})

    before = DataSet(str(shards)).table("train")
    file = replace(shards, "train", change)
    assert pq.ParquetFile(file).schema_arrow.field("input").metadata[b"tag"] == b"1"
    table = DataSet(str(shards)).table("train")
    assert table.equals(before)
    assert table.schema.metadata is None
    assert table.schema.equals(before.schema, check_metadata=True)
    for column in table.columns:
        for chunk in column.chunks:
            assert chunk.type.equals(before.schema.field("input").type, check_metadata=True) or chunk.type == pa.int64()


# -- the user's own files --------------------------------------------------------------------------------------------


def rows(folder: Path, columns: dict[str, tuple[pa.Field, pa.Array]]) -> str:
    fields, arrays = zip(*columns.values(), strict=True)
    pq.write_table(pa.Table.from_arrays(list(arrays), schema=pa.schema(fields)), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def plain(name: str, values: pa.Array) -> tuple[pa.Field, pa.Array]:
    return pa.field(name, values.type), values


X, Y = pa.array(np.linspace(0, 1, ROWS)), pa.array([row % 2 for row in range(ROWS)])


@pytest.mark.parametrize("column", ["x", "y"])
def test_pickled_objects_in_a_users_file_are_refused(column, registered, tmp_path):
    mark = tmp_path / "code-ran"
    columns = {"x": plain("x", X), "y": plain("y", Y)}
    columns[column] = (extended(column, pa.large_binary(), PICKLED), objects(mark, ROWS))
    file = rows(tmp_path, columns)
    for spec in (
        ParquetSpec(path=file, input="x", target="y"),
        ParquetSpec(path=file, input="x", target="y", target_kind="number"),
        PairsSpec(path=file, input="x", condition="y"),
    ):
        with pytest.raises(UserError) as caught:
            prepare(spec, Folder(tmp_path / "out"))
        assert str(caught.value) == (
            f"{file}: column {column} is of the extension type {PICKLED}, which is not read: its values may be code; "
            "store it as plain numbers, lists, text or bytes"
        )
    assert not mark.exists()


def test_a_later_file_is_looked_at_too(tmp_path):
    made.features(tmp_path / "in", ROWS)
    table = pq.read_table(tmp_path / "in" / "rows.parquet")
    pq.write_table(with_column(table, extended("y", pa.int64(), PICKLED), table["y"]), tmp_path / "in" / "z.parquet")
    with pytest.raises(UserError, match=f"{tmp_path}/in/z.parquet: column y is of the extension type {PICKLED}"):
        prepare(ParquetSpec(path=str(tmp_path / "in"), input="x", target="y"), Folder(tmp_path / "out"))


def test_a_column_that_nobody_reads_may_be_of_any_type(registered, tmp_path):
    mark = tmp_path / "code-ran"
    extra = (extended("notes", pa.large_binary(), PICKLED), objects(mark, ROWS))
    file = rows(tmp_path, {"x": plain("x", X), "y": plain("y", Y), "notes": extra})
    data = made.written(ParquetSpec(path=file, input="x", target="y"), tmp_path / "out")
    assert data.manifest.rows("train") == 48
    assert not mark.exists()


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(extended("element", pa.large_binary(), PICKLED)),
        pa.struct([pa.field("a", pa.int64()), extended("b", pa.large_binary(), PICKLED)]),
        pa.large_list(pa.struct([pa.field("deep", pa.list_(extended("element", pa.large_binary(), PICKLED)))])),
        pa.map_(pa.string(), extended("value", pa.large_binary(), PICKLED)),
        pa.uuid(),
        pa.fixed_shape_tensor(pa.float32(), (2, 2)),
    ],
    ids=["list", "struct", "deep", "map", "uuid", "tensor"],
)
def test_extension_types_inside_others_are_found(kind):
    buffer = io.BytesIO()
    schema = pa.schema([pa.field("x", kind), pa.field("y", pa.int64())])
    values = pa.nulls(1, kind)
    pq.write_table(pa.Table.from_arrays([values, pa.array([1])], schema=schema), buffer)
    file = ParquetFile(pa.BufferReader(buffer.getvalue()))
    assert file.extension("x") is not None
    assert file.extension("y") is None
    with pytest.raises(UnreadableError, match="column x is of the extension type"):
        file.read(["y", "x"])
    with pytest.raises(UnreadableError, match="column x is of the extension type"):
        file.first_row(["x"])
    assert file.read(["y"])["y"].to_pylist() == [1]


def test_files_of_arrow_are_read_in_one_place():
    root = Path(__file__).parents[2]
    readers = (
        "read_table",
        "ParquetFile(",
        "read_row_group(",
        "iter_batches",
        "ipc",
        "feather",
        "dataset(",
        "read_pandas",
    )
    found = {
        path.relative_to(root).as_posix()
        for package in ("nn_models", "cluster", "jobs")
        for path in (root / package).rglob("*.py")
        if any(f"pq.{reader}" in path.read_text() or f"pa.{reader}" in path.read_text() for reader in readers)
    }
    assert found == {"cluster/data/tables.py"}
