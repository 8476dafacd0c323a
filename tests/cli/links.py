"""The links of Markdown and HTML pages, and whether they lead to something; none is followed over the network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def markdown_links(text: str) -> list[str]:
    """What a page's links lead to, without those in code."""
    return re.findall(r"\]\(\s*([^)\s]+)", _without_code(text))


def markdown_anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", BLOCK.sub("", text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        again = sum(1 for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
        found.add(f"{name}-{again}" if again else name)
    return found


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken(folder: Path, paths: list[Path]) -> list[str]:
    """`page: link` for each link of these pages that leads to no file in the folder, or to no place on its page."""
    links, anchors = {}, {}
    for path in paths:
        links[path], anchors[path] = _read(path)
    found = []
    for path in paths:
        for link in links[path]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = to.is_relative_to(folder) and to.exists()
            if there and parts.fragment:
                anchors[to] = anchors.get(to) or _read(to)[1]
                there = unquote(parts.fragment) in anchors[to]
            if not there:
                found.append(f"{path.relative_to(folder)}: {link}")
    return found


def _read(path: Path) -> tuple[list[str], set[str]]:
    text = path.read_text()
    if path.suffix == ".md":
        return markdown_links(text), markdown_anchors(text)
    page = _Page()
    page.feed(text)
    return page.links, page.anchors
