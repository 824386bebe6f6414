"""The package's own tests: the conformance kit, and what makes this domain this domain."""

import pytest
from molora_books.domain import BookOptions, Books, BooksError, split_chapters

from molora_fed.testing import check_domain_conformance


@pytest.fixture
def shelf(tmp_path):
    chapters = (f"CHAPTER {n}\n\n" + f"The boat came home {n} times. " * 40 for n in (1, 2))
    (tmp_path / "sea.txt").write_text("Title\n\n" + "\n\n".join(chapters), encoding="utf-8")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "ash.txt").write_text("No headings. " * 60, encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a book " * 90, encoding="utf-8")
    return tmp_path


def read(shelf, **options):
    return list(Books(BookOptions(folder=str(shelf), **options))())


def test_keeps_the_contract(shelf):
    check_domain_conformance(Books, BookOptions(folder=str(shelf)))


def test_one_document_a_chapter_in_the_order_of_names(shelf):
    documents = read(shelf)
    assert [document.name for document in documents] == ["old/ash.txt#0", "sea.txt#1", "sea.txt#2"]
    assert documents[1].text.startswith("CHAPTER 1")
    assert len(read(shelf, min_characters=1)) == 4  # the title page, too
    assert len(read(shelf, pattern="*.md")) == 1


def test_a_folder_without_books_and_a_book_that_is_no_text_are_named(shelf, tmp_path):
    with pytest.raises(BooksError, match=r"expected files '\*\.epub' in"):
        read(shelf, pattern="*.epub")
    (shelf / "broken.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BooksError, match=r"Cannot read book 'broken\.txt': expected text in UTF-8"):
        read(shelf)


def test_a_book_without_headings_is_one_chapter():
    assert split_chapters("  a tale  ") == ["a tale"]
    assert split_chapters("Part I\nx\nPart II\ny") == ["Part I\nx", "Part II\ny"]
    assert split_chapters(" ") == []
