"""What docs/ says: its commands are there with their options, files too, its Python runs, and its pages lead on."""

import re
from pathlib import Path

import pytest
from PIL import Image

from cluster.inference.export.exporting import export
from cluster.inference.export.formats import FORMATS
from cluster.inference.export.hub import hub_files, write_files
from cluster.inference.serving.app import site
from cluster.inference.serving.requests import Limits
from tests.cli.command_lines import blocks, lines_of, parse_manta, parse_ray
from tests.unit import untrained

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
PROGRAMS = {"manta", "ray", "export", "source", "chmod", "python3", ".venv/bin/pip", "aws", "kubectl", "helm", "docker"}
PROGRAMS |= {"pip", "curl", "mlflow"}


PYTHON = [(name, code) for name, page in PAGES.items() for code in blocks(page, "python")]


def shown(program: str) -> list[str]:
    return sorted({line for page in PAGES.values() for line in lines_of(page, program)})


@pytest.mark.parametrize("line", shown("manta"))
def test_manta_has_its_commands(line):
    parse_manta(line)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve's, which the command imports where it is there
@pytest.mark.parametrize("line", shown("ray"))
def test_ray_has_its_commands(line):
    parse_ray(line)


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_a_block_is_a_command(page):
    for block in blocks(PAGES[page]):
        for line in block.replace("\\\n", " ").splitlines():
            assert line.split()[0] in PROGRAMS, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the pages' Python runs: a run of the digits, what is exported of it, and some pictures."""
    folder = tmp_path_factory.mktemp("docs")
    run = untrained.builtin(folder / "runs" / "digits", "digits-mlp")
    for name, ending in (("onnx", ".onnx"), ("torch-export", ".pt2"), ("torchscript", ".pt")):
        (folder / f"digits{ending}").write_bytes(export(run, format=FORMATS[name]).content)
    write_files(folder / "digits-hub", hub_files(run)[0])
    (folder / "scans").mkdir()
    for digit in "35":
        Image.new("L", (8, 8)).save(folder / "scans" / f"{digit}.png")
    return folder


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")  # it is known
@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[f"{name}-{place}" for place, (name, _) in enumerate(PYTHON)])
def test_its_python_runs(page, code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(code, {})


def test_what_curl_asks_is_answered():
    known = {route.path for route in site(None, token=None, limits=Limits(), measures=None).routes}
    lines = [line for line in shown("curl") if "127.0.0.1" in line]
    assert lines
    for line in lines:
        assert re.search(r"http://127\.0\.0\.1:8000(/\w*)", line)[1] in known, line


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_it_names_are_there(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert (ROOT / "docs" / link).is_file(), link
    for name in re.findall(r"(?:up|down|exec|dashboard|attach|monitor|-f) (?:--yes )?([\w/-]+\.yaml)", PAGES[page]):
        assert (ROOT / name).is_file(), name


def test_each_way_ends_with_how_it_is_brought_down():
    ways = {"one-machine.md": "ray stop", "own-hosts.md": "ray down --yes", "aws.md": "ray down --yes"}
    for page, command in {**ways, "kubernetes.md": "kubectl delete"}.items():
        end = PAGES[page].partition("the end\n")[2] or PAGES[page].partition("The end\n")[2]
        assert any(command in block for block in blocks(end)), page


def test_the_first_page_leads_to_all_others():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"]
