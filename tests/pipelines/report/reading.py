"""Read a page as a browser would: its elements, texts and every address it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "path", "rect", "circle", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    content: list[Element | str] = field(default_factory=list)

    @property
    def children(self) -> list[Element]:
        return [one for one in self.content if isinstance(one, Element)]

    @property
    def text(self) -> str:
        """All text inside, in one line."""
        parts = [one if isinstance(one, str) else one.text for one in self.content]
        return "" if self.tag in ("style", "script") else " ".join(" ".join(parts).split())

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Every element inside with this tag and these attributes (`class_` means one of its classes)."""
        found = []
        stack = list(reversed(self.children))
        while stack:
            one = stack.pop()
            stack += reversed(one.children)
            classes = one.attributes.get("class", "").split()
            named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
            fits = all(
                value in classes if name == "class" else one.attributes.get(name) == value
                for name, value in named.items()
            )
            if fits and (not tag or one.tag == tag):
                found.append(one)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        one = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].content.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open[-1].content.append(Element(tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        self.open[-1].content.append(text)


def read_page(html: str) -> Element:
    """The page as a tree; fails where elements are not closed in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root], [one.tag for one in reader.open]
    return reader.root


def assert_inert(html: str) -> Element:
    """No script, no handler, nothing fetched: only data: pictures, links inside the page, and a policy that says so."""
    page = read_page(html)
    policy = page.all("meta", http_equiv="Content-Security-Policy")
    assert len(policy) == 1
    assert policy[0].attributes["content"].startswith("default-src 'none'; img-src data:;")
    for one in page.all():
        assert one.tag not in {
            "script",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "foreignobject",
            "animate",
            "set",
        }, one
        for name, value in one.attributes.items():
            assert not name.startswith("on"), (one.tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "background", "formaction"):
                assert value.startswith(("#", "data:image/")) or value == "data:,", (one.tag, name, value[:80])
    for style in page.all("style"):
        css = "".join(one for one in style.content if isinstance(one, str))
        assert "@import" not in css
        assert "url(" not in css
    return page
