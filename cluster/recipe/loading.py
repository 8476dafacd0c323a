"""Loading: recipes and data sections from YAML, built-in names, files and dicts."""

import re
from collections.abc import Callable, Hashable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cluster.data.manifest import MANIFEST
from cluster.data.sources.base import DataSpec, absolute
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.recipe.recipe import Recipe
from cluster.storage import Folder
from nn_models.errors import UserError, did_you_mean
from nn_models.spec import override, short, validate

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"  # of a run's directory


def parse_data(text: str, changes: Mapping[str, Any] | None = None, *, name: str = "--data") -> DataSpec:
    """A data section from the command line: a source's name, a prepared folder, or YAML like {kind: parquet, …}."""
    value = parse_yaml(text, name=name)
    if isinstance(value, str) and value:
        prepared_here = "/" in value or Folder(value).exists(MANIFEST)
        value = {"kind": "shards", "path": value} if prepared_here else {"kind": value}
    value = {**value, **(changes or {})} if isinstance(value, Mapping) else value
    return validate(AnyDataSpec, value, prefix="data")


def load_recipe(
    source: "str | Path | Mapping[str, Any] | Recipe", overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of a built-in name, a YAML file (a path or URI) or a dict, with values replaced by dotted path.

    Paths in it become absolute. Raises UserError, naming path, value and fix.
    """
    recipe = read_recipe(source, overrides)
    here = str(Path.cwd())
    files = {field: absolute(path, here) for field in recipe.model.files if (path := getattr(recipe.model, field))}
    model = recipe.model.model_copy(update=files) if files else recipe.model
    return recipe.model_copy(update={"data": recipe.data.resolved(here), "model": model})


def read_recipe(
    source: "str | Path | Mapping[str, Any] | Recipe", overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The same with paths as they are written."""
    if isinstance(source, Recipe):
        recipe = source
    elif isinstance(source, Mapping):
        recipe = validate(Recipe, source)
    else:
        recipe = _from_file(str(source))
    return override(recipe, overrides) if overrides else recipe


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that come with manta."""
    files = sorted(resources.files("jobs").joinpath("recipes").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text() for file in files if file.name.endswith(".yaml")}


def parse_yaml(text: str, *, name: str) -> Any:
    """YAML with the numbers people write (1e-3 is one). Raises UserError with line and column."""
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    # PyYAML lets out what its constructors run into: a date of 2020-99-99, "!!float x", a thousand brackets
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(name, f"not valid YAML: {' '.join(str(error).split())}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    lines = []
    for section, value in recipe.model_dump(mode="json").items():
        if value is None or value == []:  # a section that this kind of recipe does not have
            continue
        if isinstance(value, dict):
            kind = {"kind": value.pop("kind")} if "kind" in value else {}
            lines += [f"{section}:", *(f"  {field}: {_flow(inner)}" for field, inner in {**kind, **value}.items())]
        else:
            lines.append(f"{section}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def lifted(content: Any) -> Any:
    """A recipe that manta has written: it has every field, or an earlier version has, where there was no such thing."""
    data = content.get("data") if isinstance(content, Mapping) else None
    if isinstance(data, Mapping) and "split_seed" in data:
        return {**content, "data": {"stratify": False, **data}}
    return content


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def _from_file(source: str) -> Recipe:
    path = Path(source)
    if "://" in source:
        folder, _, name = source.rpartition("/")
        text = _read(source, Folder(folder).read_bytes, name)
    elif path.is_file():
        text = _read(source, path.read_bytes)
    else:
        if path.suffix in (".yaml", ".yml") or "/" in source:
            raise UserError(source, "no such recipe file", "`manta recipes` lists the built-in ones")
        built_in = builtin_recipes()
        if source not in built_in:
            raise UserError(source, "no such recipe or file", did_you_mean(source, built_in))
        text = built_in[source]
    data = parse_yaml(text, name=source)
    if path.name == RECIPE and (path.parent / ENVIRONMENT).is_file():  # a run's
        data = lifted(data)
    if not isinstance(data, Mapping):
        raise UserError(source, f"a recipe is a mapping with the sections model and data, not {short(data)}")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")
    return validate(Recipe, {"name": name, **data} if name else data)


def _read(source: str, read: Callable[..., bytes], *arguments: str) -> str:
    try:
        return read(*arguments).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(source, f"not a recipe file that can be read ({error})") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # a merge key (<<: *defaults) is no key of its own
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=deep) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Puts what `_Loader` would take for a number into quotes."""


# PyYAML follows YAML 1.1, where 1e-3 and 1e5 are strings.
for _part in (_Loader, _Dumper):
    _part.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
