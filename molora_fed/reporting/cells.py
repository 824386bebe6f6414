"""Cells and lines of Rich tables that hold text from outside: shown, and never obeyed."""

from rich.text import Text

from molora_fed.storage.untrusted import MAX_SHOWN, clean

__all__ = ["as_text", "join_lines"]


def as_text(value: str | Text, style: str = "", *, limit: int = MAX_SHOWN) -> Text:
    """One line of text; what it holds of markup, links and escape sequences does nothing.

    Args:
        value: Text of any origin; a `Text` made here stays as it is.
        style: Rich's style of all of it.
        limit: Characters that are kept.
    """
    return value if isinstance(value, Text) else Text(clean(value, limit), style=style)


def join_lines(lines: "list[str]", style: str = "", *, limit: int = 1_000) -> Text:
    """Several lines, each as `as_text` makes it.

    Args:
        lines: Lines of any origin.
        style: Rich's style of all of them.
        limit: Characters of a line that are kept.
    """
    return Text("\n".join(clean(line, limit) for line in lines), style=style)
