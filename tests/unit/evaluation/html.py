"""A page as a test reads it."""

import re
from html.parser import HTMLParser

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text, and the addresses that the page refers to; fails when tags do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.addresses = "", list[str]()
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"left open: {self._open}"
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " "
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data
