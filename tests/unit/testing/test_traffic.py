"""The check of recorded traffic finds what it looks for, and nothing else."""

import json
import random
import socket
import threading

import numpy as np
import pytest

from molora_fed.testing.traffic import RecordingLine, find_text, find_tokens

NOISE = random.Random(1).randbytes(10_000)
TOKENS = np.random.default_rng(0).integers(300, 2_000, (10, 41)).astype(np.int32)
FORMS = {
    "int32": TOKENS.astype("<i4").tobytes(),
    "int64 reversed": TOKENS.astype(">i8").tobytes(),
    "int16": TOKENS.astype("<u2").tobytes(),
    "json": json.dumps(TOKENS.tolist()).encode(),
    "compact json": json.dumps(TOKENS.tolist(), separators=(",", ":")).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_token_ids_are_found_in_every_form_and_place(form):
    assert find_tokens([NOISE[:777] + FORMS[form] + NOISE], TOKENS)
    sent = FORMS[form]
    middle = sent[len(sent) // 3 : len(sent) // 3 + len(sent) // 5]  # a cut out of a row
    assert find_tokens([b"x" + middle], TOKENS)


def test_text_is_found_wherever_it_begins():
    draw = random.Random(0)
    text = "".join(draw.choice("abcdefgh ") for _ in range(500))
    assert find_text([NOISE + text[37:100].encode()], [text])


def test_other_bytes_are_not_taken_for_text():
    draw = random.Random(2)
    text = "".join(draw.choice("abcdefgh ") for _ in range(500))
    zeros = np.concatenate([np.zeros(60, np.int32), TOKENS[0]])  # padding is everywhere
    assert not find_text([NOISE], [text]) and not find_tokens([NOISE + bytes(500)], zeros)


def test_a_line_passes_on_and_keeps_both_directions():
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"got " + connection.recv(100))

    threading.Thread(target=serve, daemon=True).start()
    with RecordingLine(server.getsockname()[1]) as line:
        with socket.create_connection(("127.0.0.1", line.port)) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: client.recv(100), b""))
        assert answer == b"got hello"
        assert line.sent == [b"hello"] and line.received == [b"got hello"]
    server.close()
