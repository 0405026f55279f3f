"""Figures as inline SVG that takes its colours and fonts from the page, and as PNG.

matplotlib draws both: its text stays text, a reader needs no script to see a chart, and a dozen of them take less room
than a plotting library in JavaScript (plotly.js is 4.5 MB). Colours are drawn as placeholders and become CSS classes,
so one drawing serves light and dark, and needs no inline style, which the report's Content-Security-Policy forbids.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..data.files import atomically

STYLE = Path(__file__).parent / "templates" / "chart.mplstyle"
ROLES = ("ink", "muted", "grid", "surface", "main", "other", "trusted", "warn")
_PLACEHOLDERS = {role: f"#0102{16 + n:02x}" for n, role in enumerate(ROLES)}
_INKS = ("#1b1f24", "#59636e", "#dfe3e8", "#ffffff", "#2a5db0", "#6e7781", "#1a7f4e", "#b35900")
_PAPER = dict(zip(ROLES, _INKS, strict=True))
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
# Inches: small, so that the text stays readable where the chart is as narrow as a telephone.
SIZE = (5.2, 2.7)

Colours = dict[str, str]
# Draws into axes of matplotlib.
Draw = Callable[[Any, Colours], None]


def render(draw: Draw, name: str, label: str, size: tuple[float, float] = SIZE) -> Markup:
    """A chart as inline SVG.

    Args:
        draw: draws into axes with the given colours; artists whose `gid` starts with `tip:` show the rest of it as a
            tooltip.
        name: unique within the page.
        label: what the chart shows, in words, for those who do not see it.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _save(draw, _PLACEHOLDERS, size, buffer, name, format="svg", metadata=metadata)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
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
        "grid": ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"),
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
    """Inline style becomes attributes and classes; ids go, but for those that are referred to."""
    gid = element.get("id", "")
    if gid.startswith("tip:"):
        title = ET.Element(f"{{{_SVG}}}title")
        title.text = gid.removeprefix("tip:")
        element.insert(0, title)
    if element.tag == f"{{{_SVG}}}g":
        element.attrib.pop("id", None)
    classes = []
    rules = [rule.split(":", 1) for rule in element.attrib.pop("style", "").split(";") if ":" in rule]
    for key, value in ((k.strip(), v.strip()) for k, v in rules):
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.set("font-size", size[1] if size else "9.5")
            if "bold" in value or "700" in value:
                element.set("font-weight", "700")
        elif key == "font-size":
            element.set("font-size", value.removesuffix("px"))
        elif key != "font-family":
            element.set(key, value)
    for key in ("fill", "stroke"):
        role = next((r for r, colour in _PLACEHOLDERS.items() if element.get(key, "").lower() == colour), None)
        if role is not None:
            del element.attrib[key]
            classes.append(f"{key}-{role}")
    if classes:
        element.set("class", " ".join(classes))
