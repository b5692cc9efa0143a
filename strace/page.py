"""HTML pages that need nothing beside themselves: templates of this package in one style, light or dark as the reader
prefers."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader

INK, MUTED, GRID = "#1c2430", "#5b6675", "#e4e8ee"
# What a page shows instead of a drawing's colour where the reader prefers a dark one; others stay as they are.
DARK = {
    INK: "#e6eaf0",
    MUTED: "#8d99a8",
    GRID: "#2c3440",
    "#1f5fa8": "#66a8ee",
    "#7fb0e0": "#3d6f9f",
    "#b5402c": "#f08a74",
    "#e39a8b": "#99574a",
    "#4f7d3a": "#8cc772",
    "#a8c995": "#57794a",
    "#d9822b": "#efa14f",
    "#9aa5b1": "#7b8796",
    "#7a4fa3": "#b18bd8",
    "#2a8c8c": "#5cc0c0",
}


def render(template: str, **values: Any) -> str:
    """The page that a template of this package makes of the values; texts among them are shown, never run."""
    environment = Environment(autoescape=True, loader=PackageLoader("strace", ""))
    colours = {_name(light): (light, dark) for light, dark in DARK.items()}
    style = environment.get_template("page.css").render(colours=colours)
    return environment.get_template(template).render(style=style, **values)


def follow_page(svg: str) -> str:
    """A drawing whose colours are the page's."""
    return re.sub("|".join(DARK), lambda found: f"var({_name(found[0])})", svg)


def _name(colour: str) -> str:
    return f"--c{colour[1:]}"
