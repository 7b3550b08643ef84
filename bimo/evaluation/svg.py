"""Pictures of reports, as SVG in the page itself.

picture(lambda axes: axes.plot([1, 2], [3, 4]))            # "<svg ...>"
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["COLOURS", "picture"]

COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")


def picture(draw: Callable[[Any], object]) -> str:
    """What `draw` draws, as SVG. Its text stays text: the reader's browser has the Chinese letters, matplotlib not."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draw(axes)
    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
