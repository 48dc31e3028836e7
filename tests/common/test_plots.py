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
