"""Pictures as PNG bytes."""

from megatron_twotower.common import plots

PNG = b"\x89PNG\r\n\x1a\n"


def test_equal_numbers_draw_equal_bytes():
    curve = [(0, 8.0), (10, 5.0), (20, None), (30, 4.0)]
    draw = {"title": "t", "subtitle": "s", "unit": "nats", "theme": plots.LIGHT}
    image = plots.loss_curve(curve, curve, **draw)
    assert image.startswith(PNG)
    assert image == plots.loss_curve(curve, curve, **draw)
    assert image != plots.loss_curve([(0, 7.0), (20, 5.0)], curve, **draw)


def test_a_study_whose_sizes_have_different_arms():
    def row(size, arm, share, difference):
        found = None if difference is None else {"value": difference, "error": None}
        return {"size": size, "arm": arm, "share": share, "difference": found}

    first = [row("mini", "plain", 0.5, 0.2), row("mini", "plain", 1, None), row("mini", "other", 0.5, 0.1)]
    second = [row("small", "plain", 1, None), row("small", "third", 0.5, -0.1)]
    image = plots.study([*first, *second], reference="plain", theme=plots.LIGHT)
    assert image.startswith(PNG)
    assert image != plots.study([*first, *second[:1]], reference="plain", theme=plots.LIGHT)
    without = plots.study([*first, second[1]], reference="plain", theme=plots.LIGHT)
    assert without.startswith(PNG), "a size without its reference yet"
