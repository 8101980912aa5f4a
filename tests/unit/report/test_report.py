"""Intervals, plots and pages."""

import io
import random

import pytest
from PIL import Image

from llavakit.report.bootstrap import bootstrap_interval, wilson_interval
from llavakit.report.pages import Page
from llavakit.report.plots import Series, bar_plot, line_plot


def test_wilson_interval_of_known_cases() -> None:
    interval = wilson_interval(81, 263)  # the textbook case of Newcombe (1998)
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(10, 10).high == 1.0
    assert (wilson_interval(0, 0).low, wilson_interval(0, 0).high) == (0.0, 1.0)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(100):
        interval = bootstrap_interval([rng.gauss(1.0, 2.0) for _ in range(60)], resamples=300)
        covered += interval.low <= 1.0 <= interval.high
    assert 85 <= covered <= 100


def test_bootstrap_interval_is_reproducible_and_needs_values() -> None:
    assert bootstrap_interval([1.0, 2.0, 5.0], seed=3) == bootstrap_interval([1.0, 2.0, 5.0], seed=3)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_line_plot_draws_its_line_where_the_values_are() -> None:
    rising = Series("loss", tuple((float(x), float(x)) for x in range(50)))
    image = Image.open(io.BytesIO(line_plot([rising], title="t", x_label="x", y_label="y"))).convert("RGB")
    blue = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == (31, 90, 180)]
    left = min(blue)
    right = max((x, y) for x, y in blue if y < 300)
    assert left[1] > right[1]


def test_plots_take_no_points_and_numbers_that_are_not_finite() -> None:
    for points in ((), ((0.0, float("nan")), (1.0, 2.0)), ((1.0, 1.0),)):
        assert line_plot([Series("a", points)], title="", x_label="", y_label="").startswith(b"\x89PNG")
    assert bar_plot([("a", 1.0), ("b", -2.0)], title="", y_label="").startswith(b"\x89PNG")


def test_pages_escape_all_text() -> None:
    page = Page("<script>")
    page.heading("<b>")
    page.paragraph("a & b")
    page.table(("<i>",), (("<img>",),))
    page.picture(b"png", '"onerror="')
    text = page.to_html()
    assert "<script>" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert text.count("<img") == 1
    assert 'alt="&quot;onerror=&quot;"' in text
