import gzip

import pytest

from molora_fed.corpus.manuals import pages, reduce_roff
from molora_fed.errors import CorpusError

PAGE = r""".\" Copyright
.de Sp
.sp .5v
..
.TH LS 1 "2024"
.SH NAME
ls \- Verzeichnisinhalt auf\%listen
.SH "DIE \(:UBERSICHT"
.B ls
[\fIOPTION\fR]...\& [\,\fIDATEI\/\fR]
.PP
.BR ls (1)
zeigt \(Fo\[u00E4]\(Fc und \[u0061_0308].\" nicht das
.TP
\fB\-a\fR, \fB\-\-all\fR
.IP \(bu 2
\s-1GROSS\s0 \h'-04'caf\('e\e
.if n \{\
.RE
.\}
"""


def test_roff_becomes_text():
    assert reduce_roff(PAGE) == (
        "\nNAME\nls - Verzeichnisinhalt auflisten\n\nDIE ÜBERSICHT\nls\n[OPTION]... [DATEI]\n\n"
        "ls(1)\nzeigt «ä» und ä.\n\n-a, --all\n•\nGROSS café\\\n"
    ).lstrip("\n")


@pytest.mark.parametrize("source", ["", "no heading", ".TH X 1\ntext\n", "\0\\"])
def test_what_is_no_page_gives_nothing(source):
    assert reduce_roff(source) == ""


def test_pages_are_found_along_the_man_path(tmp_path, monkeypatch):
    folder = tmp_path / "usr" / "share" / "man" / "de" / "man1"
    folder.mkdir(parents=True)
    (tmp_path / "usr" / "bin").mkdir()
    body = ".SH NAME\n" + "genug Text für eine Seite, in jeder Zeile derselbe\n" * 20
    (folder / "b.1.gz").write_bytes(gzip.compress(body.encode()))
    (folder / "a.1").write_text(body.replace("genug", "viel"), encoding="utf-8")
    (folder / "short.1").write_text(".SH NAME\nkurz\n")
    (folder / "old.1").write_bytes(body.encode("latin-1"))
    (folder / "cut.1.gz").write_bytes(gzip.compress(body.encode())[:-9])
    monkeypatch.setenv("PATH", str(tmp_path / "usr" / "bin"))
    monkeypatch.delenv("MANPATH", raising=False)
    documents = list(pages.de())
    assert [document.name for document in documents] == ["man1/a.1", "man1/b.1"]
    assert documents[1].text.startswith("NAME\ngenug Text für")


def test_an_absent_language_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MANPATH", str(tmp_path))
    with pytest.raises(
        CorpusError, match=r"'man-pt-br': expected text in manual pages of .*'pt_BR'"
    ):
        list(pages.pt_BR())


def test_a_language_is_two_letters_and_perhaps_a_country():
    for wrong in ("german", "d", "../de", "pt_br"):
        assert not hasattr(pages, wrong)
