"""Figures as inline SVG that takes its colours and fonts from the page, and as PNG.

matplotlib draws both: its text stays text, a reader needs no script to see a chart, and a dozen of them take less room
than a plotting library in JavaScript (plotly.js is 4.5 MB). Colours are drawn as placeholders and become variables of
the page's style sheet, so one drawing serves light and dark.
"""

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..data.files import atomically

STYLE = Path(__file__).parent / "templates" / "chart.mplstyle"
ROLES = ("ink", "muted", "line", "surface", "main", "other", "trusted", "warn")
_PLACEHOLDERS = {role: f"#0102{16 + n:02x}" for n, role in enumerate(ROLES)}
_VARIABLES = {colour: f"var(--{role})" for role, colour in _PLACEHOLDERS.items()}
_INKS = ("#1b1f24", "#59636e", "#dfe3e8", "#ffffff", "#2a5db0", "#6e7781", "#1a7f4e", "#b35900")
_PAPER = dict(zip(ROLES, _INKS, strict=True))
_SVG = "http://www.w3.org/2000/svg"
# Inches: small, so that the text stays readable where the chart is as narrow as a telephone.
SIZE = (5.2, 2.7)

Colours = dict[str, str]
# Draws into axes of matplotlib.
Draw = Callable[[Any, Colours], None]


def render(draw: Draw, name: str, label: str, size: tuple[float, float] = SIZE) -> Markup:
    """A chart as inline SVG; `name` is unique within the page, `label` says what it shows."""
    buffer, metadata = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _save(draw, _PLACEHOLDERS, size, buffer, name, format="svg", metadata=metadata)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rsplit("}")[-1] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _restyle(element)
    for attribute in ("width", "height"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"class": "chart", "role": "img", "aria-label": label, "focusable": "false"})
    return Markup(ET.tostring(root, encoding="unicode"))


def save_png(draw: Draw, path: Path, size: tuple[float, float] = SIZE) -> None:
    """The same chart for paper: white ground, 200 dots per inch."""
    atomically(path, lambda file: _save(draw, _PAPER, size, file, format="png", dpi=200, facecolor="white"))


def _save(draw: Draw, colours: Colours, size: tuple[float, float], target: Any, salt: str = "", **how: Any) -> None:
    """Draw a chart and write it; the look is the same whatever the user has set."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    roles = {
        "line": ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"),
        "muted": ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
        "ink": ("text.color", "legend.labelcolor"),
    }
    look = {name: colours[role] for role, names in roles.items() for name in names}
    with rc_context(look | {"svg.hashsalt": salt}, fname=str(STYLE)):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.grid(axis="y")
        draw(axes, colours)
        figure.savefig(target, **how)


def _restyle(element: ET.Element) -> None:
    """Inline style, which the page's policy forbids, becomes attributes; fonts and ids that all charts have go."""
    if element.tag == f"{{{_SVG}}}g":
        element.attrib.pop("id", None)
    for rule in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in rule.partition(":"))
        if value and not key.startswith("font"):
            element.set(key, _VARIABLES.get(value, value))
