"""The text of an HTML page, in one pass and in linear time.

Python's own parser takes time that grows with the square of some malformed pages (20 seconds for
60 KB of unclosed tags), and a tree may be nested without end. Only the text is needed here: tags
are found as the HTML standard's tokenizer finds them, and nothing is nested.
"""

import html
import re
from collections.abc import Iterator

__all__ = ["extract_text"]

_DROPPED = ("script", "style", "noscript", "template", "svg", "math", "iframe", "object")
"""Elements whose content is not shown as text; it ends at the first end tag of the same name."""
_RAW = ("title", "textarea")
"""Elements in which tags are text."""
_BLOCKS = (
    "address aside body br caption center dd details dialog div dt fieldset figcaption footer form "
    "head header html legend li main menu nav optgroup option select summary tbody textarea tfoot "
    "thead tr"
)
_PARAGRAPH_BLOCKS = (
    "article blockquote dl figure h1 h2 h3 h4 h5 h6 hr ol p pre section table title ul"
)
_PARAGRAPHS = frozenset(_PARAGRAPH_BLOCKS.split())
_BREAKS = _PARAGRAPHS | frozenset(_BLOCKS.split())
_CELLS = frozenset(("td", "th"))
_NAME = re.compile(r"[a-z][^\s/>\0]{0,40}", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\r\n\f]+")
_AFTER_QUOTE = re.compile(r"[\"'>]")


def extract_text(page: str) -> str:
    """What a page says, without scripts, styles and comments.

    White space is one space, as browsers show it, and stays as it is within `<pre>`; blocks are
    lines, paragraphs and headings have a blank line between them, cells a tab.

    Args:
        page: HTML, well-formed or not.
    """
    lines = _Lines()
    for kind, value in _split(page):
        if kind == "text":
            lines.add(html.unescape(value))
        elif kind == "start" and value in _CELLS:
            lines.begin_cell()
        elif value in _BREAKS:
            lines.end_line(blank=value in _PARAGRAPHS)
        if kind != "text" and value == "pre":
            lines.is_kept = kind == "start"
    return lines.finish()


class _Lines:
    """Lines of text under way; `is_kept` keeps white space as it is."""

    def __init__(self) -> None:
        self.is_kept = False
        self._lines: list[str] = []
        self._parts: list[str] = []  # of the line that has begun
        self._has_blank = False

    def add(self, text: str) -> None:
        if self.is_kept:
            *whole, text = text.split("\n")
            for piece in whole:
                self._parts.append(piece)
                self.end_line(blank=not "".join(self._parts).strip())
        else:
            text = _SPACE.sub(" ", text)
            if not self._parts or self._parts[-1].endswith((" ", "\t")):
                text = text.removeprefix(" ")
        if text:
            self._parts.append(text)

    def begin_cell(self) -> None:
        if self._parts:
            self._parts.append("\t")

    def end_line(self, *, blank: bool) -> None:
        line = "".join(self._parts).rstrip()
        self._parts.clear()
        if line.strip():
            if self._has_blank and self._lines:
                self._lines.append("")
            self._lines.append(line if self.is_kept else line.lstrip())
            self._has_blank = False
        self._has_blank |= blank

    def finish(self) -> str:
        self.end_line(blank=False)
        return "".join(f"{line}\n" for line in self._lines)


def _split(page: str) -> Iterator[tuple[str, str]]:
    """Texts, and start and end tags by name in lower case, in order: ("start", "p")."""
    lower = page.lower() if len(page.lower()) == len(page) else _lower_ascii(page)
    place, shown = 0, 0  # text from `shown` on has not been given out
    while (opened := page.find("<", place)) >= 0:
        kind, name, end = _read_tag(page, opened)
        if not kind:
            place = opened + 1  # a "<" that begins no tag is text
            continue
        if opened > shown:
            yield "text", page[shown:opened]
        if name:
            yield kind, name
        place = shown = end
        if kind == "start" and name in (*_DROPPED, *_RAW):
            closing = _find_closing(lower, name, end)
            if name in _RAW:
                yield "text", page[end:closing]
            place = shown = closing
    if shown < len(page):
        yield "text", page[shown:]


_UPPER = {ord(letter): letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def _lower_ascii(page: str) -> str:
    return page.translate(_UPPER)


def _find_closing(lower: str, name: str, start: int) -> int:
    """Where an element's end tag begins; the end of the page without one."""
    wanted = f"</{name}"
    while (found := lower.find(wanted, start)) >= 0:
        after = lower[found + len(wanted) : found + len(wanted) + 1]
        if not after or after in " \t\r\n\f/>":
            return found
        start = found + 1
    return len(lower)


def _read_tag(page: str, opened: int) -> tuple[str, str, int]:
    """What begins at a "<": kind, name and the first character after it; no kind if it is text.

    What is not closed reaches to the end of the page: so no part is looked through twice.
    """
    if page.startswith("<!--", opened):
        if page.startswith((">", "->"), opened + 4):
            return "comment", "", page.index(">", opened) + 1
        return "comment", "", _after(page, "-->", opened + 4)
    if page.startswith("<![CDATA[", opened):
        return "comment", "", _after(page, "]]>", opened)
    if page.startswith(("<!", "<?"), opened):
        return "comment", "", _after(page, ">", opened)
    is_end = page.startswith("</", opened)
    name = _NAME.match(page, opened + 1 + is_end)
    if name is None:
        return ("comment", "", _after(page, ">", opened)) if is_end else ("", "", opened)
    end = _find_tag_end(page, name.end())
    return "end" if is_end else "start", name.group().lower(), end


def _after(page: str, wanted: str, start: int) -> int:
    found = page.find(wanted, start)
    return found + len(wanted) if found >= 0 else len(page)


def _find_tag_end(page: str, place: int) -> int:
    """The first character after a tag's ">", which may stand in quoted values, too."""
    while found := _AFTER_QUOTE.search(page, place):
        if found.group() == ">":
            return found.end()
        before = page[max(place, found.start() - 40) : found.start()].rstrip()
        if not before.endswith("="):  # a quote that begins no value is a part of a name
            place = found.end()
            continue
        closing = page.find(found.group(), found.end())
        if closing < 0:
            return len(page)
        place = closing + 1
    return len(page)
