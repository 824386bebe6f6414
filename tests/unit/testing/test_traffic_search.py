"""The search of the traffic test finds what is planted, however it is packed, and nothing else."""

import base64
import bz2
import gzip
import lzma
import random
import re
import zlib

import pytest
from traffic_helpers import KEYS, Group, Index, Needles, list_bodies, search, unpack

DRAW = random.Random(3)
NOISE = DRAW.randbytes(4_000)
STRINGS = {DRAW.randbytes(size) for size in (8, 11, 16, 31, 32, 47, 64, 200) for _ in range(12)}
ONE = Group("anna", "text, held-out", "utf-8")


def bare(data):
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(data) + deflate.flush()


PACKINGS = {
    "raw": bytes,
    "hex": lambda data: data.hex().encode(),
    "upper hex": lambda data: data.hex().upper().encode(),
    "base64": base64.b64encode,
    "urlsafe base64": base64.urlsafe_b64encode,
    "base64 in lines": base64.encodebytes,
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "weak zlib": lambda data: zlib.compress(data, 1),
    "deflate": bare,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "gzip in base64": lambda data: base64.b64encode(gzip.compress(data)),
    "hex in zlib": lambda data: zlib.compress(data.hex().encode()),
}


@pytest.fixture(scope="module")
def index():
    needles = Needles()
    needles.add(ONE, STRINGS)
    return Index(needles)


@pytest.mark.parametrize("how", PACKINGS)
@pytest.mark.parametrize("lead", range(4))
def test_every_string_is_found_however_it_is_packed(index, how, lead):
    # Between letters that go on with it, so that groups of digits begin anywhere.
    planted = bytes(range(65, 65 + lead)) + b"".join(sorted(STRINGS)) + b"end"
    stream = NOISE[:777] + b"{" + PACKINGS[how](planted) + b"}" + NOISE[777:900]
    found = search(index, stream)
    assert set().union(*found.values()) == STRINGS
    last = how.split(" in ")[0].split()[-1]
    assert how == "deflate" or any(last in way for way in found)


@pytest.mark.parametrize("how", PACKINGS)
def test_nothing_is_found_where_nothing_is(index, how):
    assert not search(index, NOISE[:500] + PACKINGS[how](NOISE[:900]) + NOISE[:700])


@pytest.mark.parametrize("size", [8, 9, 16, 17, 64, 65])
def test_a_string_is_found_at_every_place_of_a_stream(index, size):
    needles = Needles()
    string = DRAW.randbytes(size)
    needles.add(ONE, [string])
    own = Index(needles)
    for place in [*range(20), 2**22 - 70, 2**22 - size, 2**22 - 1, 2**22]:
        assert own.find(bytes(place) + string) == {string}
    assert not own.find(string[:-1] + bytes(1)) or string.endswith(bytes(1))


def test_runs_of_digits_are_those_of_the_plain_pattern():
    words = [b"abcdefgh", b"0123", b"+/", b"\r\n", b"\n", b" ", b"-_", b"\xff\x00", b"9A"]
    data = b"".join(DRAW.choice(words) for _ in range(20_000))
    parts = dict(unpack(data, deep=False))
    hexadecimal = re.findall(rb"[0-9A-Fa-f]{16,}", data)
    assert hexadecimal
    for run in hexadecimal:
        assert bytes.fromhex(run[: len(run) // 2 * 2].decode()) in parts["hex"]
    runs = re.findall(rb"[A-Za-z0-9+/_-]{12,}(?:\r?\n[A-Za-z0-9+/_-]+)*", data)
    assert len(runs) > 1_000
    for run in runs:
        digits = run.translate(bytes.maketrans(b"-_", b"+/"), b"\r\n")
        assert base64.b64decode(digits[: len(digits) // 4 * 4]) in parts["base64"]


def test_many_small_packed_streams_are_all_looked_through(index):
    strings = sorted(STRINGS)
    stream = b"".join(NOISE[n : n + 9] + zlib.compress(one) for n, one in enumerate(strings))
    assert search(index, stream)["zlib"] == STRINGS


def test_what_begins_alike_is_told_apart():
    needles = Needles()
    needles.add(ONE, [b"the same beginning, one end", b"the same beginning, another"])
    assert Index(needles).find(b"... the same beginning, another") == {
        b"the same beginning, another"
    }


def test_strings_that_are_public_or_of_two_are_dropped_and_counted():
    needles = Needles()
    other = Group("bob", "text, held-out", "utf-8")
    needles.add(ONE, [b"shared by two", b"anna's alone", b"in the base"])
    needles.add(other, [b"shared by two", b"bob's alone"])
    needles.drop_shared("of several members")
    needles.drop([b"in the base"], "public")
    assert needles.groups == {ONE: {b"anna's alone"}, other: {b"bob's alone"}}
    assert needles.dropped["text, held-out", "of several members"] == 2
    assert needles.dropped["text, held-out", "public"] == 1
    with pytest.raises(ValueError, match="8 bytes"):
        needles.add(ONE, [bytes(KEYS[-1] - 1)])


def test_bodies_come_out_of_messages():
    body = b"".join(sorted(STRINGS))
    chunks = b"".join(
        b"%x;part=1\r\n%s\r\n" % (len(body[at : at + 33]), body[at : at + 33])
        for at in range(0, len(body), 33)
    )
    packed = gzip.compress(body)
    stream = (
        b"POST /v1/one HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        b"GET /v1/two HTTP/1.1\r\nHost: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n"
        b"Content-Length: " + str(len(packed)).encode() + b"\r\n\r\n" + packed + b""
        b"POST /v1/three HTTP/1.1\r\ncontent-length: 4\r\n\r\nlast"
    )
    assert list_bodies(stream) == [body, body, b"last"]
    assert list_bodies(b"no such thing") == [b"no such thing"]
    cut = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5\r\nwo"
    assert list_bodies(cut) == [b"hellowo"]
    needles = Needles()
    needles.add(ONE, [body])
    own = Index(needles)
    assert not search(own, chunks) and search(own, list_bodies(stream)[0])


def test_a_string_that_is_cut_off_is_not_found():
    needles = Needles()
    needles.add(ONE, [b"ends in zeros" + bytes(5)])
    own = Index(needles)
    assert own.find(b"x" + b"ends in zeros" + bytes(5))
    assert not own.find(b"x" + b"ends in zeros" + bytes(4))
