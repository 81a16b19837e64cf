"""The documents: what they name is there, and their figures are those of the code."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import crossvit
from crossvit.model.cost import cost
from crossvit.model.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "src").rglob("*.md")),
]
# Files of the repository, as pages and docstrings name them.
NAMED = re.compile(
    r"(?<![\w./:$-])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|json|cpp|h|html|css|js|svg)|[\w-]+\.md)\b"
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings: lower case, no punctuation, hyphens for spaces."""
    seen: Counter[str] = Counter()
    result = set()
    for heading in HEADING.findall(without_code(page.read_text(encoding="utf-8"))):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return result


def is_in_the_repository(name: str, page: Path) -> bool:
    """Whether `name` is a file seen from the page, the root, the package, or a folder of it."""
    homes = [page.parent, ROOT, ROOT / "src", ROOT / "src" / "crossvit", ROOT / "docs"]
    return any((home / name).exists() for home in homes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    named = {name for name in NAMED.findall(text) if not name.startswith(("runs/", "http"))}
    assert not sorted(name for name in named if not is_in_the_repository(name, page))


def test_the_map_of_the_files_names_files_of_their_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(src/crossvit/\w+(?:/\w+)?)/` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 10
    absent = [
        f"{folder}/{name}"
        for folder, cell in rows
        for name in re.findall(r"`(\w+\.\w+)`", cell)
        if not (ROOT / folder / name).is_file()
    ]
    assert not absent


def test_what_the_code_cites_is_in_the_repository() -> None:
    absent = set()
    for source in [*(ROOT / "src").rglob("*"), *(ROOT / "tests").rglob("*.py")]:
        if source.suffix not in {".py", ".toml", ".cpp", ".h"} or source == Path(__file__):
            continue
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:PAPER|SPEED|PEERS|RIVALS|LIBRARIES), section", text), source
        assert not re.search(r"\bissue \d", text, re.IGNORECASE), source
        for name in re.findall(r"\b(?:docs|dev)/[\w/]+\.md\b", text):
            if not (ROOT / name).is_file():
                absent.add((str(source.relative_to(ROOT)), name))
    assert not absent


def test_the_paper_has_the_sections_that_docstrings_cite() -> None:
    page = ROOT / "docs" / "paper.md"
    sections = set(re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    cited = set()
    for source in [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.toml")]:
        text = re.sub(r"\s*\n\s*#?\s*", " ", source.read_text(encoding="utf-8"))
        cited |= set(re.findall(r"docs/paper\.md, ([A-Z][a-z ]+?)[).;:]", text))
    assert cited
    assert cited <= sections


def test_the_counts_of_the_paper_s_page_are_those_of_the_cost_model() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    compared = 0
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = [cell.strip("`") for cell in cells if cell.strip("`") in PRESETS]
        counts = [
            int(cell.replace(",", "")) for cell in cells if re.fullmatch(r"\d+,\d{3},\d{3}", cell)
        ]
        if not names or not counts:
            continue
        parts = cost(PRESETS[names[0]].config, keys_values="materialised")
        total = parts["total"].parameters
        assert counts == [total, total - parts["positions"].parameters][: len(counts)], names[0]
        assert f"{parts['total'].macs / 1e9:.3f}" in cells, names[0]
        compared += 1
    assert compared == 23  # Table 1 and higher resolution, Table 6, Table 8


def test_the_glossary_has_each_term_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [term.lower() for term in re.findall(r"^- \*\*(.+?)\*\*:", text, re.MULTILINE)]
    assert len(terms) > 100
    assert len(terms) == len(set(terms))


def test_the_reference_and_the_menu_of_the_site_are_complete() -> None:
    folder = ROOT / "docs" / "reference"
    text = "\n".join(page.read_text(encoding="utf-8") for page in folder.glob("*.md"))
    documented = re.findall(r"^::: crossvit\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(set(crossvit.__all__) - {"__version__"})
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    menu = set(re.findall(r"'([\w/]+\.md)'", str(site["project"]["nav"])))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in folder.parent.rglob("*.md")}
    assert menu == pages
