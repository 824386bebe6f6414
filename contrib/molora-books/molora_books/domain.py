"""A domain that reads a folder of books, one document a chapter."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from pydantic import Field

from molora_fed import Configurable, Document, MoloraError, PluginOptions

__all__ = ["BookOptions", "Books", "BooksError", "split_chapters"]

_CHAPTER = re.compile(r"^\s*(?:chapter|part|book)\s+(?:\d+|[ivxlc]+)\b.*$", re.I | re.M)


class BooksError(MoloraError):
    """The folder cannot be read, or holds no book."""


class BookOptions(PluginOptions):
    """Where the books are.

    Attributes:
        folder: Folder of the books; `~` is the user's home. It stays on this machine.
        pattern: Which of its files, and of those below it, are books.
        min_characters: Chapters shorter than that are left out: tables of contents, title pages.
    """

    folder: str = "~/books"
    pattern: str = "*.txt"
    min_characters: int = Field(default=500, ge=1)


class Books(Configurable[BookOptions]):
    """Reads every book of a folder, in the order of their names."""

    def __call__(self) -> Iterator[Document]:
        """One document a chapter, named after its book and its number.

        Raises:
            BooksError: If there is no such folder, no book in it, or one is no text in UTF-8.
        """
        folder = Path(self.options.folder).expanduser()
        paths = sorted(p for p in folder.rglob(self.options.pattern) if p.is_file())
        if not paths:
            raise BooksError(
                f"Cannot read books: expected files '{self.options.pattern}' in '{folder}', got "
                "none. Set the option folder."
            )
        for path in paths:
            name = path.relative_to(folder).as_posix()
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BooksError(
                    f"Cannot read book '{name}': expected text in UTF-8, got {error}. Convert it "
                    "or leave it out."
                ) from error
            for number, chapter in enumerate(split_chapters(text)):
                if len(chapter) >= self.options.min_characters:
                    yield Document(f"{name}#{number}", chapter)


def split_chapters(text: str) -> list[str]:
    """Parts of a book, each from its heading to the next; the whole if it has no headings.

    Args:
        text: The book.
    """
    starts = [match.start() for match in _CHAPTER.finditer(text)]
    bounds = [0, *(start for start in starts if start > 0), len(text)]
    parts = [text[first:last].strip() for first, last in pairwise(bounds)]
    return [part for part in parts if part]
