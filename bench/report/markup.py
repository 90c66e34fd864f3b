"""Elements of HTML, in which a text is a text whatever it says."""

import json
from typing import Any
from xml.etree import ElementTree

Node = ElementTree.Element


def node(tag: str, *children: str | Node, **attributes: str) -> Node:
    """An element; attributes' underscores are hyphens, and a last one is dropped (``class_``)."""
    made = Node(tag, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def html(made: Node) -> str:
    """The element as HTML. Written as XML, which leaves no < in an attribute either; no element here is void."""
    return ElementTree.tostring(made, encoding="unicode", short_empty_elements=False)


def data(value: Any) -> str:
    """JSON that can stand within a script element: nothing in it ends that, or a line."""
    found = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        found = found.replace(character, f"\\u{ord(character):04x}")
    return found


def table(columns: list[str], rows: list[list[str]], label: str) -> Node:
    """A table that scrolls in its own box; the first column names a row."""
    head = node("tr", *(node("th", column, scope="col") for column in columns))
    body = [
        node("tr", node("th", row[0], scope="row"), *(node("td", value) for value in row[1:]))
        for row in rows
    ]  # fmt: skip
    return boxed(node("table", node("thead", head), node("tbody", *body)), label)


def boxed(inner: Node, label: str) -> Node:
    """A region that can be scrolled with the keyboard, too."""
    return node("div", inner, class_="scroll", role="region", tabindex="0", aria_label=label)


def unfolded(summary: str, *inner: str | Node) -> Node:
    """Something that shows when it is asked for."""
    return node("details", node("summary", summary), *inner)
