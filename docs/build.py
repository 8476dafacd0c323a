"""Builds the site of this folder's pages and of the reference, which is made of the docstrings, with pdoc.

python docs/build.py [OUT]    by default build/docs
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pdoc.doc
import pdoc.render

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SEARCH = "search.js"
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
REFERENCE = {
    "cluster": "what is called from Python",
    "opened": "what `cluster.open_model` gives, and what is asked of it",
    "recipe": "a recipe: its sections and their fields",
    "models": "the models that a recipe may name",
    "objectives": "the objectives",
    "data": "the sources of data",
    "nn_models": "models without Ray, and how descriptions are read",
}


def build(out: Path) -> None:
    """Write the site into a folder, in the place of an earlier one there."""
    if out.exists() and not (out / SEARCH).exists():
        raise SystemExit(f"error: {out} is there, and holds something else; move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as beside:
        new = Path(beside) / "new"
        (new / "files").mkdir(parents=True)
        _write(new)
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)


def _write(out: Path) -> None:
    pages = [*_pages(out), *_reference()]
    all_modules = {page.__name__: pdoc.doc.Module(page) for page in pages}
    pdoc.render.configure(template_directory=DOCS / "templates", show_source=False, docformat="markdown")
    pdoc.render.env.globals["title_of"] = _title
    for name, module in all_modules.items():
        (out / f"{name}.html").write_text(_living(pdoc.render.html_module(module, all_modules)))
    (out / SEARCH).write_text(pdoc.render.search_index(all_modules))


def _living(page: str) -> str:
    """The page without links to members of PyTorch's and pydantic's classes, which are on no page; their names stay."""
    there = set(re.findall(r'\bid="([^"]+)"', page))
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', lambda link: link[0] if link[1] in there else link[2], page)


def _title(module: pdoc.doc.Module) -> str:
    """A page's first heading; of the reference its name."""
    heading = re.match(r"# (.+)", module.docstring)
    return heading[1] if heading else module.modulename


# -- pages: a module each, of which there is nothing but its docstring -----------------------------------------------


def _pages(out: Path) -> Iterator[ModuleType]:
    for path in sorted(DOCS.glob("*.md")):
        text = LINK.sub(lambda link: f"]({_linked(link[1], out)}{link[2] or ''})", path.read_text())
        if path.stem == "README":
            rows = [f"| [{name}]({name}.html) | {what} |" for name, what in REFERENCE.items()]
            text = "\n".join([text, "## The reference", "", "| page | of |", "|---|---|", *rows, ""])
        yield ModuleType(_page(path), text)


def _page(path: Path) -> str:
    return "index" if path.stem == "README" else path.stem


def _linked(link: str, out: Path) -> str:
    """Where a link of a page leads on the site: to another page, or to a copy of a file of the tree."""
    path = (DOCS / link).resolve()
    if "://" in link or not path.is_file():
        return link
    if path.parent == DOCS:
        return f"{_page(path)}.html"
    shutil.copy(path, out / "files")
    return f"files/{path.name}"


# -- the reference ---------------------------------------------------------------------------------------------------


def _reference() -> Iterator[ModuleType]:
    import cluster
    import nn_models
    from cluster.data.sources.base import DataSpec
    from cluster.inference.explain import Explained, explain
    from cluster.recipe.recipe import Recipe
    from cluster.runs import opened
    from cluster.runs.predictor import OpenedModel, Predictor
    from nn_models.model import ModelSpec
    from nn_models.objectives import ObjectiveSpec

    models = [OpenedModel, Predictor, opened.Writer, opened.Forecaster, opened.Parser, opened.Coder, opened.Generator]
    specs = {"models": ModelSpec, "objectives": ObjectiveSpec, "data": DataSpec}
    found: dict[str, list[Any]] = {name: [] for name in [*specs, "recipe"]}
    for spec in _specs(Recipe):
        found[next((name for name, base in specs.items() if issubclass(spec, base)), "recipe")].append(spec)
    for module in (cluster, nn_models):
        yield _module(module.__name__, module.__doc__ or "", ((name, getattr(module, name)) for name in module.__all__))
    yield _named("opened", [*models, explain, Explained])
    for name, some in found.items():
        yield _named(name, some)


def _specs(spec: Any) -> list[Any]:
    """A Spec and all that its fields may be, in their order, each after its bases."""
    from nn_models.spec import Spec

    found: dict[Any, None] = {}

    def add(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Spec) and annotation not in found:
            found.update(dict.fromkeys(base for base in annotation.__mro__[::-1] if issubclass(base, Spec)))
            for field in annotation.model_fields.values():
                add(field.annotation)
        for inner in get_args(annotation):
            add(inner)

    add(spec)
    return [*found]


def _named(name: str, members: Iterable[Any]) -> ModuleType:
    what = REFERENCE[name]
    return _module(name, f"{what[0].upper()}{what[1:]}.", ((member.__name__, member) for member in members))


def _module(name: str, doc: str, members: Iterable[tuple[str, Any]]) -> ModuleType:
    """A module of these names alone: those that are imported on first use are there as well."""
    module = ModuleType(name, doc)
    vars(module).update(members)
    vars(module)["__all__"] = [member for member in vars(module) if not member.startswith("__")]
    return module


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    build(place)
    print(place / "index.html")
