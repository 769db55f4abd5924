"""report.html in a real browser: nothing leaves it, everything in it works by mouse and keyboard, on any screen."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases_report as cases
import numpy as np
import pytest
from PIL import Image

from gpuclust.report import Report, Samples
from gpuclust.report.legend import LIGHT
from gpuclust.report.page import render_page

pytestmark = pytest.mark.browser


class Opened:
    """A report open in a browser, with all that it logged and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"reduced_motion": "reduce", **options})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html.on #chart svg")

    def layer(self) -> str:
        """The layer that the bar, the chart, the table of layers and the address agree on."""
        page = self.page
        shown = {
            page.locator("#layer option:checked").inner_text(),
            page.locator("#chart text.on").text_content(),
            page.locator("#all tr[aria-current=true] th b").inner_text(),
            page.get_attribute("#slider", "aria-valuetext"),
        }
        assert len(shown) == 1, shown
        return shown.pop()


@pytest.fixture(scope="module")
def report() -> Report:
    return cases.report(layers=6, classes=5, per_class=24)


@pytest.fixture(scope="module")
def path(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report #1.html"
    file.write_text(render_page(report), encoding="utf-8")
    return file


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    made = Opened(browser, path)
    yield made
    made.context.close()
    assert made.faults == []
    assert [url for url in made.requests if not url.startswith("data:")] == [made.requests[0]]


def _ink(page: Any, selector: str) -> int:
    """How many colours of the picture of an element differ from its ground."""
    image = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return len(image.getcolors(1 << 24) or [])


def test_it_opens_at_the_best_layer_with_the_answer_on_top(opened: Opened, report: Report) -> None:
    best = report.results[report.best()]
    assert opened.layer() == best.layer
    assert opened.page.locator("h1").inner_text().startswith(f"{best.layer} groups the images by class")
    assert f"{report.chance['accuracy']:.1%}" in opened.page.locator("h1").inner_text()
    assert opened.page.locator("#chart line.chance").count() >= 2
    assert "chance" in opened.page.locator("#chart").text_content()
    assert opened.page.locator("#all tbody tr").count() == len(report.results) + 1
    for name in ("AlexNet_Weights.IMAGENET1K_V1", "truncated: 1204 bytes missing", "pictures/mug/<b>.png", "2.14.0"):
        assert name in opened.page.content().replace("&lt;", "<").replace("&gt;", ">")


def test_layers_by_mouse(opened: Opened) -> None:
    page = opened.page
    page.click("#previous")
    assert opened.layer() == "fc5"
    page.click("#next")
    assert opened.layer() == "fc6"
    page.select_option("#layer", label="conv2")
    assert opened.layer() == "conv2"
    page.locator("#chart .hit").nth(3).click()
    assert opened.layer() == "fc4"
    page.locator("#all tbody tr").nth(2).click()
    assert opened.layer() == "conv3"
    box = page.locator("#slider").bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    assert opened.layer() == "conv1"
    assert page.locator("#previous").is_disabled()
    assert page.url.endswith("#conv1")


def test_layers_by_keyboard_and_address(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("ArrowLeft")
    assert opened.layer() == "fc5"
    page.focus("#slider")
    page.keyboard.press("Home")
    assert opened.layer() == "conv1"
    page.keyboard.press("ArrowRight")
    assert opened.layer() == "conv2"
    page.evaluate("location.hash = 'fc4'")
    page.wait_for_function("document.querySelector('#layer').value === '3'")
    assert opened.layer() == "fc4"
    page.evaluate("location.hash = '%E0%A4%A'")
    page.reload()
    page.wait_for_selector("#chart svg")
    assert opened.layer() == "fc6"
    opened.requests[1:] = [url for url in opened.requests[1:] if url.split("#")[0] != opened.requests[0]]


def test_images_have_the_border_of_their_class_in_the_cluster_of_the_result(opened: Opened, report: Report) -> None:
    page, samples = opened.page, report.samples
    page.select_option("#layer", label="conv3")
    result = report.results[2]
    rows = page.locator("#rows .row")
    assert rows.count() == result.k
    order = sorted(range(result.k), key=lambda cluster: result.match[cluster])
    for index, cluster in enumerate(order):
        members = np.flatnonzero(result.labels == cluster)
        nearest = members[np.argsort(result.dist2[members], kind="stable")]
        tiles = (
            rows.nth(index)
            .locator(".tile[data-image]")
            .evaluate_all(
                """nodes => nodes.map(node => [
                    +node.dataset.image, getComputedStyle(node).borderTopColor, node.querySelector('img').src])"""
            )
        )
        assert [image for image, *_ in tiles] == nearest[: len(tiles)].tolist()
        for image, border, source in tiles:
            code = LIGHT[samples.labels[image]]
            assert border == "rgb({}, {}, {})".format(*bytes.fromhex(code[1:]))
            assert base64.b64decode(source.partition(",")[2]) == samples.thumbs[image]
        name, count = samples.classes[result.match[cluster]], result.table[cluster, result.match[cluster]]
        assert rows.nth(index).locator("h3 > span").inner_text() == name
        assert f"cluster {cluster}: {count} of {len(members)} are {name}" in rows.nth(index).inner_text()
    assert page.locator("#rows img").evaluate_all("nodes => nodes.every(n => n.complete && n.naturalWidth > 0)")


def test_clusters_one_by_one_and_a_class_through_the_layers(opened: Opened, report: Report) -> None:
    page = opened.page
    cluster = int(report.results[-1].match.argmax())
    page.select_option("#cluster", value=str(cluster))
    assert page.locator("#rows .row").count() == 1
    shown = page.locator("#rows .tile[data-image]").count()
    if page.locator("#rows .tile.more").count():
        page.click("#rows .tile.more")
        assert page.locator("#rows .tile[data-image]").count() > shown
    page.click("#by-layer")
    page.select_option("#class", label="mug")
    assert page.locator("#rows .row").count() == len(report.results)
    assert page.locator("#rows .row h3").all_inner_texts() == [result.layer for result in report.results]
    page.locator("#rows .row h3 button").nth(1).press("Enter")
    assert opened.layer() == "conv2"


def test_tiles_by_keyboard_and_a_class_brought_out(opened: Opened) -> None:
    page = opened.page
    first = page.locator("#rows .tile[data-image]").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('#rows .tile')[1]")
    page.keyboard.press("Enter")
    assert page.locator("#rows .tile.pin").count() == 1
    first.hover()
    assert page.locator("#tip img").is_visible()
    before = _ink(page, "#points")
    page.locator("#legend button").nth(2).click()
    dimmed = page.locator("#rows .tile.dim").count()
    assert 0 < dimmed < page.locator("#rows .tile[data-image]").count()
    assert _ink(page, "#points") != before


def test_heat_map_holds_the_table(opened: Opened, report: Report) -> None:
    page, result = opened.page, report.results[-1]
    cells = page.locator("#table tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => +cell.textContent))"
    )
    order = sorted(range(result.k), key=lambda cluster: result.match[cluster])
    assert cells == result.table[order].tolist()
    matched = page.locator("#table td.match").evaluate_all(
        "cells => cells.map(cell => [cell.parentNode.rowIndex - 1, +cell.dataset.column])"
    )
    assert matched == [[row, row] for row in range(result.k)]
    shades = page.locator("#table td").evaluate_all(
        "cells => new Set(cells.map(c => getComputedStyle(c).backgroundColor)).size"
    )
    assert shades > 1


def test_projection_is_drawn_in_the_colours_of_the_classes(opened: Opened) -> None:
    page = opened.page
    image = Image.open(io.BytesIO(page.locator("#points").screenshot())).convert("RGB")
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    for code in LIGHT[:5]:
        near = np.abs(pixels - list(bytes.fromhex(code[1:]))).max(1) < 30
        assert near.sum() > 50, code
    assert "%" in page.locator("#projection-note").inner_text()
    page.click("#by-found")
    assert page.get_attribute("#points", "aria-label").endswith("coloured by cluster")


def test_scores_are_switched_and_the_table_sorted(opened: Opened, report: Report) -> None:
    page = opened.page
    lines = page.locator("#chart path.line").count()
    page.click("#chips button:has-text('silhouette')")
    assert page.locator("#chart path.line").count() == lines + 1
    page.click("#all thead button:has-text('accuracy')")
    names = page.locator("#all tbody tr[data-layer] th b").all_inner_texts()
    accuracy = {result.layer: result.scores["accuracy"] for result in report.results}
    assert [accuracy[name] for name in names] == sorted(accuracy.values())
    assert page.locator("#all tbody tr").last.inner_text().startswith("chance")


HOSTILE = (*cases.HOSTILE, "\N{GRINNING FACE} 'x' \"y\" &amp; <!--", "a" * 200)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = cases.report(layers=3, classes=7, per_class=8, names=HOSTILE)
    samples = made.samples
    paths = (f"{HOSTILE[0]}/</script>\N{PILE OF POO}.jpg", *samples.paths[1:])
    made = Report(
        made.results,
        Samples(paths, samples.labels, samples.classes, (b"", *samples.thumbs[1:])),
        made.chance,
        {**made.run, "network": {"name": "<b>net</b>", "weights": "</title><script>alert(1)</script>"}},
    )
    file = tmp_path_factory.mktemp("hostile") / "report.html"
    file.write_text(render_page(made), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_names_are_text(browser: Any, hostile: Path, width: int) -> None:
    opened = Opened(browser, hostile, viewport={"width": width, "height": 844})
    page = opened.page
    page.on("dialog", lambda dialog: opened.faults.append(dialog.message))
    assert page.locator("#legend button span").all_text_contents() == list(HOSTILE)
    assert page.locator("#table thead th[title]").evaluate_all("n => n.map(th => th.title)") == list(HOSTILE)
    assert page.locator(".question b").inner_text() == "<b>net</b>"
    page.click("#by-layer")
    page.locator("#rows .tile[data-image]").first.hover()
    assert page.locator("script").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img[src='x']").count() == 0
    opened.context.close()
    assert opened.faults == []


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_narrow_screen_never_scrolls_sideways(browser: Any, path: Path, width: int) -> None:
    opened = Opened(browser, path, viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True)
    page = opened.page
    for step in (lambda: None, lambda: page.click("#by-layer"), lambda: page.tap("#previous")):
        step()
        assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    assert opened.layer() == "fc5"
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('main *, header *')]
            .filter(n => n.checkVisibility() && [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()))
            .map(n => parseFloat(getComputedStyle(n).fontSize)))"""
    )
    assert smallest >= 11
    opened.context.close()
    assert opened.faults == []


_CONTRAST = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return text.startsWith('color(srgb')
    ? [n[0] * 255, n[1] * 255, n[2] * 255, n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
  const light = (c) => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = (node) => { for (; node; node = node.parentElement) {
    const c = parse(getComputedStyle(node).backgroundColor); if (c[3] > .99) return c; } return [255, 255, 255, 1]; };
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    if (!node.checkVisibility() || node.closest('svg, :disabled, .skip')) continue;
    if (![...node.childNodes].some(c => c.nodeType === 3 && c.data.trim())) continue;
    const a = light(parse(getComputedStyle(node).color)) + .05, b = light(ground(node)) + .05;
    const ratio = Math.max(a / b, b / a);
    if (ratio < 4.5) low.push(`${node.tagName}.${node.className} ${node.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(browser: Any, path: Path, scheme: str) -> None:
    opened = Opened(browser, path, color_scheme=scheme)
    page = opened.page
    assert page.evaluate(_CONTRAST) == []
    image = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert (np.median(np.asarray(image)) > 128) == (scheme == "light")
    page.click("#theme")
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "theme: dark"
    assert np.median(np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))) < 128
    opened.context.close()
    assert opened.faults == []


def test_print_is_light_and_whole(browser: Any, path: Path, report: Report) -> None:
    opened = Opened(browser, path, color_scheme="dark", viewport={"width": 720, "height": 1000})
    page = opened.page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(_CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert not page.locator("#slider").is_visible()
    for selector in ("#chart svg", "#rows img >> nth=0", "#table table", "#points", "#all"):
        assert page.locator(selector).is_visible(), selector
    page.emulate_media(media=None)
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20
    opened.context.close()
    assert opened.faults == []


def test_without_javascript_the_answer_and_the_numbers_stay(browser: Any, path: Path, report: Report) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("h1").is_visible()
    assert page.locator("img.static").is_visible()
    assert page.locator("#all tbody tr").count() == len(report.results) + 1
    assert not page.locator("#bar").is_visible()
    context.close()


@pytest.fixture(scope="module")
def large() -> Report:
    """5 classes x 100 images x 20 layers, with thumbnails of 64 pixels that are all noise: no picture is larger."""
    base = cases.report(layers=20, classes=5, per_class=100, pictures=False)
    rng = np.random.default_rng(0)
    thumbs = []
    for _ in range(500):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG", quality=85)
        thumbs.append(stream.getvalue())
    samples = Samples(base.samples.paths, base.samples.labels, base.samples.classes, tuple(thumbs))
    return Report(base.results, samples, base.chance, base.run)


def test_five_classes_a_hundred_images_twenty_layers(browser: Any, large: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render_page(large), encoding="utf-8")
    assert file.stat().st_size < 10_000_000
    opened = Opened(browser, file)
    assert "All 500 images are on the page" in opened.page.locator("#shown").inner_text()
    names = opened.page.locator("#chart text.name").all_text_contents()
    assert names == [result.layer for result in large.results]
    opened.page.click("#by-layer")
    assert opened.page.locator("#rows .row").count() == 20
    opened.context.close()
    assert opened.faults == []


@pytest.mark.parametrize(("k", "classes"), [(1, 3), (9, 3), (2, 4), (60, 50)])
def test_any_number_of_clusters_and_classes(browser: Any, tmp_path: Path, k: int, classes: int) -> None:
    made = cases.report(layers=1 if k == 1 else 2, classes=classes, per_class=6, k=k, pictures=classes < 10)
    file = tmp_path / "report.html"
    file.write_text(render_page(made), encoding="utf-8")
    opened = Opened(browser, file)
    page = opened.page
    page.click("#next", force=True)
    rows = page.locator("#rows .row")
    assert rows.count() == min(k, 12)
    while page.locator("#more-rows").is_visible():
        page.click("#more-rows")
    assert rows.count() == k
    if k > classes:
        assert "no class left to match" in rows.last.inner_text()
    page.click("#by-layer")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    opened.context.close()
    assert opened.faults == []
