"""matplotlib's SVG made fit for a page that embeds dozens of them: a fifth of the size, and in the reader's theme.

One drawing serves both themes: the neutral colours of the light one become variables that a reader's preference for
dark pages sets otherwise. An SVG in an `img` is a document of its own, so its style cannot meet the page's, nor its
identifiers another figure's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from reports.palette import DARK, LIGHT

# Text stays text, in the reader's own font. matplotlib lays it out in DejaVu Sans, wider than nearly all of these.
FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
ROLES = ("background", "foreground", "muted", "line", "accent")

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_VARIABLES = {getattr(LIGHT, role): f"var(--{role})" for role in ROLES}
_TOKEN = re.compile(r"[A-Za-z]|-?[0-9.]+(?:e-?[0-9]+)?")
_REFERENCE = re.compile(r"#([\w-]+)(?=\)|$)")
# An inherited or initial value that matplotlib spells out on every element.
_NOTHING = frozenset({"text-anchor: start", "stroke-linecap: butt", "stroke-width: 1.0"})


def compact(source: str, width: int, height: int) -> str:
    """The SVG that matplotlib wrote in `source`, small, themed, and `width` x `height` CSS pixels large."""
    root = ElementTree.fromstring(source)
    return _Compactor(root).write(width, height)


class _Compactor:
    """One document on its way: the styles it uses as classes, the identifiers it refers to by short names."""

    def __init__(self, root: Element):
        self.root = root
        self.classes: dict[str, str] = {}
        self.names: dict[str, str] = {}
        for element in root.iter():
            for key, value in element.attrib.items():
                if key == _HREF or "url(#" in value:
                    for name in _REFERENCE.findall(value):
                        self.names.setdefault(name, f"i{len(self.names)}")

    def write(self, width: int, height: int) -> str:
        children = [self._markup(element) for child in self.root for element in _flat(child)]
        box = self.root.get("viewBox")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="{box}">'
            f"<style>{self._style()}</style>{''.join(children)}</svg>"
        )

    def _style(self) -> str:
        light, dark = (
            ":root{" + ";".join(f"--{role}:{getattr(theme, role)}" for role in ROLES) + "}" for theme in (LIGHT, DARK)
        )
        rules = "".join(f".{name}{{{style}}}" for style, name in self.classes.items())
        # Round joins are what matplotlib leaves unsaid.
        common = f"*{{stroke-linejoin:round}}text{{font-family:{FONTS}}}"
        return f"{light}@media (prefers-color-scheme:dark){{{dark}}}{common}{rules}"

    def _markup(self, element: Element) -> str:
        tag = element.tag.removeprefix(_SVG)
        attributes = "".join(f' {key}="{_escape(value)}"' for key, value in self._attributes(element))
        inner = _escape(element.text or "") if tag == "text" else ""
        inner += "".join(self._markup(part) for child in element for part in _flat(child))
        return f"<{tag}{attributes}>{inner}</{tag}>" if inner else f"<{tag}{attributes}/>"

    def _attributes(self, element: Element) -> Iterator[tuple[str, str]]:
        for key, value in element.attrib.items():
            if key == "id":
                if value in self.names:
                    yield "id", self.names[value]
            elif key == "style":
                yield from self._class(value)
            elif key == "fill" and value in _VARIABLES:  # the ground of a hatch
                yield from self._class(f"fill: {value}")
            elif key == "d":
                yield "d", _path(value)
            elif key in ("x", "y", "width", "height"):
                yield key, _number(float(value), 1)
            elif key == "transform":
                if not value.startswith("rotate(-0 "):
                    yield key, value
            else:
                yield ("href" if key == _HREF else key), self._renamed(value)

    def _class(self, style: str) -> Iterator[tuple[str, str]]:
        parts = (part for part in style.split("; ") if not part.startswith("font-family") and part not in _NOTHING)
        short = ";".join(self._declaration(*part.split(": ", 1)) for part in parts)
        if short:
            yield "class", self.classes.setdefault(short, f"c{len(self.classes)}")

    def _declaration(self, name: str, value: str) -> str:
        return f"{name}:{_VARIABLES.get(value) or self._renamed(value)}"

    def _renamed(self, value: str) -> str:
        return _REFERENCE.sub(lambda match: f"#{self.names.get(match[1], match[1])}", value)


def _flat(element: Element) -> Iterator[Element]:
    """The element, or what a group holds that says nothing about it; matplotlib's own style and empty groups vanish."""
    tag = element.tag.removeprefix(_SVG)
    if tag == "style":
        return
    if tag == "g" and not set(element.attrib) - {"id"}:
        for child in element:
            yield from _flat(child)
    elif tag != "defs" or any(child.tag != f"{_SVG}style" for child in element):
        yield element


def _path(d: str) -> str:
    """The same path to a tenth of a unit (a hundredth where it curves), level and upright lines as H and V."""
    curved = "C" in d or "Q" in d
    places = 2 if curved else 1
    out: list[str] = []
    command, numbers, here = "", [], ("", "")
    for token in _TOKEN.findall(d):
        if token.isalpha():
            command, numbers = token, []
            if token in "zZ":
                out.append("z")
            continue
        numbers.append(_number(float(token), places))
        if len(numbers) < {"C": 6, "Q": 4}.get(command, 2):
            continue
        out.append(_segment(command, numbers, here))
        here, numbers = (numbers[-2], numbers[-1]), []
    return "".join(out)


def _segment(command: str, numbers: list[str], here: tuple[str, str]) -> str:
    if command == "L":
        if numbers[1] == here[1]:
            return "" if numbers[0] == here[0] else f"H{numbers[0]}"
        if numbers[0] == here[0]:
            return f"V{numbers[1]}"
    return command + " ".join(numbers)


def _number(value: float, places: int) -> str:
    text = f"{value:.{places}f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
