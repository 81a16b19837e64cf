"""The pages in a real browser: nothing asked of the network, nothing fails, readable in light, dark, on a phone and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crossvit.report.comparison import comparison_page
from crossvit.report.page import data_page, evaluation_page, run_page
from crossvit.results import Evaluation, TrainingResult
from support.evaluations import (
    class_names,
    made_comparison,
    made_data_check,
    made_epochs,
    made_evaluation,
    made_multi_label,
    made_record,
)

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no Playwright: pip install playwright (never its own browsers)"
)
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TEN, HUNDRED = class_names(10), class_names(100)
PAGES = ("run", "hundred", "thousand", "multi-label", "comparison", "data")
PHONE, PAPER, DESK = (
    {"width": 360, "height": 740},
    {"width": 700, "height": 1000},
    {"width": 1100, "height": 900},
)  # CSS pixels
READABLE, READABLE_LARGE = 4.5, 3.0  # contrast of text, WCAG 2.2, 1.4.3

# The least contrast of any text on the page against what is painted below it, and that text.
LEAST_CONTRAST = """
() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((value, i) => value * a + below[i] * (1 - a));
  const ground = (element) => {
    const below = element.parentElement ? ground(element.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), below);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = [21, ''];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('script, style')) continue;
    const size = parseFloat(style.fontSize);
    if (!size) continue;
    const below = ground(element);
    const ink = over(parse(element.closest('svg') ? style.fill : style.color), below);
    const [high, low] = [light(ink), light(below)].sort((a, b) => b - a);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const contrast = ((high + 0.05) / (low + 0.05)) * (large ? %f : 1);
    if (contrast < least[0]) least = [contrast, walker.currentNode.data.trim()];
  }
  return least;
}
""" % (READABLE / READABLE_LARGE)  # the script has braces of its own


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Address of each kind of page, written to a folder whose name needs escaping."""
    folder = tmp_path_factory.mktemp("pages with spaces é")
    ten, hundred, thousand = (
        ten_classes(),
        made_evaluation(HUNDRED, each=12),
        made_evaluation(class_names(1000), each=6),
    )
    run = TrainingResult(
        "runs/hand made", ten.top1, ten.n, 131.0, made_record(TEN), made_epochs(12), ten
    )
    several = made_multi_label(class_names(7))
    texts = {
        "run": run_page(run, ten),
        "hundred": evaluation_page(
            hundred, command="crossvit evaluate run data", record=made_record(HUNDRED)
        ),
        "thousand": evaluation_page(thousand, command="crossvit evaluate run data"),
        "multi-label": evaluation_page(
            several, command="crossvit evaluate runs/several photos.csv"
        ),
        "comparison": comparison_page(
            made_comparison(accuracies=(0.8, 0.9, 0.85), classes=30),
            command="crossvit report a b c",
        ),
        "data": data_page(made_data_check(TEN)),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


def ten_classes() -> Evaluation:
    return made_evaluation(TEN, each=40)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium of Debian's with an empty profile."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def look(chromium: Any, pages: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Opens a page by name; whatever it says on the console, throws, or asks for makes the test fail at its end."""
    contexts, wrong = [], []

    def opened(name: str, **settings: Any) -> Any:
        context = chromium.new_context(**{"viewport": DESK, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "request",
            lambda asked: (
                wrong.append(f"asked for {asked.url}") if leaves(asked.url, pages[name]) else None
            ),
        )
        page.goto(pages[name])
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def leaves(address: str, page: str) -> bool:
    return address != page and not address.startswith("data:")


# ---------------------------------------------------------------- every page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_quiet_whole_and_fits_a_phone(look: Callable[..., Any], name: str) -> None:
    page = look(name, viewport=PHONE, is_mobile=True, device_scale_factor=2)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert (
        page.evaluate(
            "[...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt)"
        )
        == []
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    wider = "[...document.querySelectorAll('section, .tile, h1, p')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{wider}.map((e) => e.textContent.slice(0, 60))") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_text_can_be_read(look: Callable[..., Any], name: str, scheme: str) -> None:
    contrast, text = look(name, color_scheme=scheme).evaluate(LEAST_CONTRAST)
    assert contrast >= READABLE, f"{text!r} has a contrast of {contrast:.2f}"


@pytest.mark.parametrize("name", PAGES)
def test_paper_hides_nothing(look: Callable[..., Any], name: str) -> None:
    page = look(name, color_scheme="dark", viewport=PAPER)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    contrast, text = page.evaluate(LEAST_CONTRAST)
    assert contrast >= READABLE, f"{text!r} has a contrast of {contrast:.2f}"
    inside = "[...document.querySelectorAll('details > :not(summary)')]"
    assert (
        page.evaluate(
            f"{inside}.filter((e) => !e.checkVisibility() || !e.getBoundingClientRect().height).length"
        )
        == 0
    )
    hidden = "[...document.images].filter((image) => !image.getBoundingClientRect().height).length"
    assert page.evaluate(hidden) == 0  # pictures and maps both
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"]
    cut = "[...document.querySelectorAll('.scroll, pre')].filter((e) => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{cut}.map((e) => e.textContent.trim().slice(0, 60))") == []


# ---------------------------------------------------------------- the matrix


def names_of(page: Any) -> list[str]:
    rows: list[str] = page.evaluate(
        "[...document.querySelectorAll('.confusion tbody th')].map((cell) => cell.textContent)"
    )
    columns = page.evaluate(
        "[...document.querySelectorAll('.confusion thead th')].slice(1).map((cell) => cell.title)"
    )
    assert rows == columns
    return rows


def counts_of(page: Any) -> list[list[int]]:
    cells = "[...row.cells].slice(1).map((cell) => +cell.textContent)"
    counts: list[list[int]] = page.evaluate(
        f"[...document.querySelectorAll('.confusion tbody tr')].map((row) => {cells})"
    )
    return counts


def test_the_matrix_sorts_rows_and_columns_together(look: Callable[..., Any]) -> None:
    evaluation, page = ten_classes(), look("run")
    index = {name: place for place, name in enumerate(TEN)}
    total = evaluation.confusion.sum(axis=1)
    errors = 1 - evaluation.confusion.diagonal() / total
    expected = {
        "by size": sorted(TEN, key=lambda name: -total[index[name]]),
        "by error": sorted(TEN, key=lambda name: -errors[index[name]]),
        "as in the data": TEN,
    }
    for button, names in expected.items():
        page.get_by_role("button", name=button).click()
        assert page.get_by_role("button", name=button).get_attribute("aria-pressed") == "true"
        assert names_of(page) == names
        order = [index[name] for name in names]
        assert counts_of(page) == evaluation.confusion[order][:, order].tolist()
    page.get_by_role("button", name="by name").click()
    names = names_of(page)
    assert names.index("fig 9") < names.index("fig 10")  # numbers by their size
    assert sorted(names) == sorted(TEN)


def test_a_cell_says_what_it_is_under_the_pointer(look: Callable[..., Any]) -> None:
    evaluation, page = ten_classes(), look("run")
    tip = page.locator(".tip")
    assert not tip.is_visible()
    page.get_by_role("button", name="by error").click()
    names = names_of(page)
    for row, column in ((0, 0), (0, 3), (9, 9), (4, 5)):
        true, answer = TEN.index(names[row]), TEN.index(names[column])
        count, n = int(evaluation.confusion[true, answer]), int(evaluation.confusion[true].sum())
        what = (
            f"{names[row]}: correct"
            if row == column
            else f"{names[row]} predicted as {names[column]}"
        )
        page.locator(".confusion tbody tr").nth(row).locator("td").nth(column).hover()
        assert tip.inner_text().split("\n") == [
            what,
            f"{count} of {n} ({100 * count / n:.1f}\u202f%)",
        ]
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= DESK["width"]
    page.locator("h1").hover()
    assert not tip.is_visible()


def test_the_matrix_is_read_with_the_arrow_keys(look: Callable[..., Any]) -> None:
    page = look("run")
    page.locator(".confusion").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator(".tip").inner_text().startswith(f"{TEN[1]}: correct")
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()


def test_a_matrix_of_the_most_confused_keeps_its_last_column(look: Callable[..., Any]) -> None:
    page = look("thousand")
    page.get_by_role("button", name="by size").click()
    heads = page.evaluate(
        "[...document.querySelectorAll('.confusion thead th')].map((cell) => cell.title)"
    )
    assert len(heads) == 62
    assert heads[-1] == "another class"
    totals = page.evaluate(
        "[...document.querySelectorAll('.confusion tbody tr')].map((row) => +row.dataset.n)"
    )
    assert [sum(row) for row in counts_of(page)] == totals == sorted(totals, reverse=True)


def test_without_script_the_matrix_is_read_all_the_same(look: Callable[..., Any]) -> None:
    page = look("run", java_script_enabled=False)
    assert not page.locator(".matrix .controls").is_visible()
    assert (
        page.locator(".confusion td[title]")
        .first.get_attribute("title")
        .startswith("crab: correct, ")
    )
    assert page.locator(".confusion td.h").first.is_visible()


# ---------------------------------------------------------------- mistakes


def test_mistakes_turn_from_picture_to_map(look: Callable[..., Any]) -> None:
    page = look("run")
    picture, overlay = (
        page.locator(".picture-map").first.locator("img").nth(place) for place in (0, 1)
    )
    assert (picture.is_visible(), overlay.is_visible()) == (True, False)
    page.get_by_text("what it looked at").click()
    assert (picture.is_visible(), overlay.is_visible()) == (False, True)
    page.get_by_text("picture", exact=True).click()
    assert (picture.is_visible(), overlay.is_visible()) == (True, False)


def test_a_page_is_printed(look: Callable[..., Any], tmp_path: Path) -> None:
    """Printing opens what is closed and leaves it as it was."""
    page = look("hundred")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
