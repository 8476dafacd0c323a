"""What docs/ says: its commands are there with their options, the files that it names too, and its pages lead on."""

import re
from pathlib import Path

import pytest

from tests.cli.command_lines import blocks, lines_of, parse_manta, parse_ray

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
PROGRAMS = {"manta", "ray", "export", "source", "chmod", "python3", ".venv/bin/pip", "aws", "kubectl", "helm", "docker"}
PROGRAMS |= {"pip", "curl", "mlflow"}


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
