"""Links of the pages that people read, and of the site that is built of them: none leads nowhere."""

import importlib.util
from pathlib import Path

import pytest

import cluster
import nn_models
from nn_models.zoo import MODELS
from tests.cli.links import broken, markdown_anchors

ROOT = Path(__file__).parents[2].resolve()
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("docs").resolve() / "site"
    module.build(out)
    module.build(out)  # in the place of an earlier one
    return out


def test_links_lead_somewhere():
    assert broken(ROOT, [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    page.write_text(
        "# A `b` c\n[1](b.md) [2](b.md#two-three) [3](#a-b-c) [4](https://a.invalid/x)\n```\n[5](c.md)\n```\n"
    )
    other.write_text("# Two, three\n## Two, three\n[6](c.md) [7](a.md#b) `[8](c.md)` [9](../a.md)\n")
    assert broken(tmp_path, [page, other]) == ["b.md: c.md", "b.md: a.md#b", "b.md: ../a.md"]
    assert markdown_anchors(other.read_text()) == {"two-three", "two-three-1"}


def test_the_site_has_all_pages_and_its_links_lead_somewhere(site):
    pages = sorted(site.glob("*.html"))
    names = {page.stem for page in pages}
    assert {path.stem for path in PAGES} - {"README"} < names
    assert broken(site, pages) == []
    index = (site / "index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in names - {"index"})


def test_the_reference_has_every_public_name(site):
    for package in (cluster, nn_models):
        text = (site / f"{package.__name__}.html").read_text()
        assert [name for name in package.__all__ if f'id="{name}"' not in text] == []
    models = (site / "models.html").read_text()
    assert [spec.__name__ for spec in MODELS.values() if f'id="{spec.__name__}"' not in models] == []
