"""The page in a real browser: it draws every chart, reports no error and does what its buttons say."""

import base64
import html
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest

from sabrage.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1280,900", "--enable-logging=stderr", "--v=0",
)  # fmt: skip
DESKTOP, PHONE = 1280, 390
# What a test's own lines may use, and how what they return gets out: as text of the document.
PROBE = """<script>addEventListener("load", () => {
  const all = name => [...document.querySelectorAll(name)];
  const chart = document.querySelector("[aria-label$='against tokens trained on']");
  const panel = chart.closest(".panel"), paths = () => chart.querySelectorAll("path").length;
  const ticks = () => [...chart.querySelectorAll("text")].map(text => text.textContent).join(" ");
  const button = name => [...panel.querySelectorAll("button")].find(one => one.textContent === name);
  const point = (kind, share, buttons = 0) => {
    const box = chart.getBoundingClientRect(), clientX = box.left + share * box.width;
    chart.dispatchEvent(new PointerEvent(kind, {clientX, clientY: box.top + 80, buttons}));
  };
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = btoa(encodeURIComponent(JSON.stringify((() => { LINES })())));
  top.document.body.append(note);
});</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")


@pytest.fixture
def page(make_run, study, kernels, tmp_path):
    """A page with everything: a study with a race, a group of six runs and one of one, and a benchmark."""
    summary = study / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"explored": {"80": 3.6, "100": 3.4}}))
    paths = [make_run("slow", second=3.0), make_run("fast", second=0.5, changes={"model.layers": 1}), study]
    gpu = make_run("gpu", steps=20, done=False, device={"name": "GPU", "memory": 1})
    return write_report([*paths, gpu, kernels], out=tmp_path / "page.html")


@pytest.fixture
def visit(page, tmp_path):
    """visit(*flags) -> what the browser prints; a line on the page's console is a failure."""

    def call(*flags):
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, f"file://{page}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
        return done.stdout

    return call


@pytest.fixture
def act(page, visit):
    """act(lines, width) -> what these lines of JavaScript return in the page."""

    def call(lines, width=DESKTOP):
        probed = page.read_text().replace("</body>", PROBE.replace("LINES", lines))
        if width != DESKTOP:
            # No window is as narrow as a phone, but a frame may be.
            probed = f'<iframe style="border: 0; width: {width}px" srcdoc="{html.escape(probed)}"></iframe>'
        page.write_text(probed)
        text = re.search(r'<pre id="probe">(.*?)</pre>', visit("--dump-dom"))[1]
        return json.loads(unquote(base64.b64decode(text).decode()))

    return call


def test_an_error_on_the_page_would_be_seen(page, visit):
    page.write_text(page.read_text().replace("</body>", "<script>undefinedName()</script></body>"))
    with pytest.raises(AssertionError, match="undefinedName is not defined"):
        visit("--dump-dom")


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_every_chart_is_drawn_and_fits_the_window(act, width):
    seen = act(
        """return {
          lines: all("svg.chart").map(svg => svg.querySelectorAll("path").length),
          odd: all("path").filter(path => !/^M[-0-9.]+,[-0-9.]+/.test(path.getAttribute("d"))).length,
          wide: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
          bars: all(".single i, .stack i").filter(bar => bar.getBoundingClientRect().width > 0).length,
        }""",
        width,
    )
    # The race; then, of six runs and of one, two lines each of the losses and one each of four more.
    assert seen["lines"] == [1, 12, 12, 6, 6, 6, 6, 2, 2, 1, 1, 1, 1]
    assert (seen["odd"], seen["width"]) == (0, width)
    assert seen["wide"] <= 0
    assert seen["bars"] == 17


def test_runs_recipes_and_the_training_loss_can_be_switched_off_and_on(act):
    seen = act(
        """const seen = [paths()], drawn = chart.innerHTML;
        const twice = name => {
          document.querySelector(name).click(); seen.push(paths()); document.querySelector(name).click();
        };
        twice("input[data-run=r0]");
        twice("[data-runs='r0 r2 r4']");
        twice("[data-look=faint]");
        for (const variant of all("[data-runs]")) variant.click();
        seen.push(paths(), all("input[data-run]").filter(box => box.checked).length);
        for (const variant of all("[data-runs]")) variant.click();
        return [...seen, chart.innerHTML === drawn]"""
    )
    assert seen == [12, 10, 6, 6, 0, 0, True]


def test_axes_can_be_logarithmic(act):
    seen = act(
        """const drawn = chart.innerHTML, seen = [];
        for (const name of ["log x", "log y"]) {
          const before = chart.innerHTML;
          button(name).click();
          seen.push(chart.innerHTML !== before, button(name).getAttribute("aria-pressed"));
        }
        seen.push(/NaN|Infinity/.test(chart.innerHTML));
        button("log x").click();
        button("log y").click();
        return [...seen, chart.innerHTML === drawn]"""
    )
    assert seen == [True, "true", True, "true", False, True]


def test_pointing_shows_values_and_leaving_hides_them(act):
    shown, hidden = act(
        """const tip = panel.querySelector(".tip"), cursor = () => chart.querySelector(".cursor");
        const look = () => [tip.hidden, cursor().getAttribute("visibility"), tip.textContent];
        point("pointermove", .97);
        const shown = look();
        point("pointerleave", .9);
        return [shown, look()]"""
    )
    assert (shown[:2], hidden[:2]) == ([False, "visible"], [True, "hidden"])
    assert "tokens trained on20,480" in shown[2]
    assert "deep, seed 0, validation3.5" in shown[2]


def test_dragging_zooms_and_a_button_zooms_out(act):
    seen = act(
        """const drawn = chart.innerHTML, before = ticks(), seen = [button("zoom out").hidden];
        point("pointerdown", .5, 1);
        point("pointermove", .7, 1);
        point("pointerup", .7);
        seen.push(ticks() !== before, button("zoom out").hidden);
        button("zoom out").click();
        return [...seen, chart.innerHTML === drawn]"""
    )
    assert seen == [True, True, False, True]


def test_the_leaderboard_sorts_by_the_column_that_is_clicked(act):
    rising, falling = act(
        """const order = () => all(".board")[0].querySelectorAll("tbody small");
        const names = () => [...order()].map(small => small.textContent);
        const train = all(".board th button").find(one => one.textContent === "train");
        train.click();
        const rising = names();
        train.click();
        return [rising, names()]"""
    )
    assert (rising[0], rising[-1]) == ("fast", "slow")
    assert (falling[0], falling[-1]) == ("slow", "fast")


def test_the_page_prints(visit, tmp_path):
    visit("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
