"""Changes a file as an attacker would: inside its structure first, then in its bytes."""

import json
import math
import random
import tomllib
from collections.abc import Callable
from typing import Any

import tomli_w

Mutate = Callable[[bytes, random.Random], bytes]

_TEXTS = (
    "", "a", "x" * 300, "x" * 5_000, "../../etc/passwd", "/etc/passwd", "a/b", ".", "..", "\x00",
    "\x1b[31m", "[/x]", "$\\frac{$", "\ud800", "\u202e", "base", "0" * 64, "f" * 64, "NaN", "1e999",
    "-1", "<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n", "é" * 70, "F32", "BF16", "F8_E4M3",
)  # fmt: skip
_STARTS = (b"PK\x03\x04", b"\x80\x04", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1")
_NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 16, 64, 127, 128, 255, 257, 4096, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
    -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -1e-300, 1e300, 1e30,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


_COUNTS = (2, 2, 2, 40, 300)
_REPEATS = (*(1, 8, 64) * 5, 25_000)
_OUTER = 12  # places that are tried more often: each decides about much
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _choose_scalar(chance: random.Random, words: tuple[str, ...] = ()) -> Any:
    if words and chance.random() < 0.4:
        return chance.choice(words)
    return chance.choice((*_TEXTS, *_NUMBERS, None, True, False))


def _choose_value(chance: random.Random, words: tuple[str, ...]) -> Any:
    kind = chance.randrange(6)
    if kind == 0:
        return [_choose_scalar(chance, words) for _ in range(chance.choice((0, 1, 2, 50)))]
    if kind == 1:
        return {
            str(_choose_scalar(chance, words))[:400]: _choose_scalar(chance, words)
            for _ in range(2)
        }
    if kind == 2:
        deep: Any = _choose_scalar(chance)
        for _ in range(chance.choice((2, 30, 60, 300))):
            deep = [deep] if chance.random() < 0.5 else {"k": deep}
        return deep
    return _choose_scalar(chance, words)


def _choose_like(value: Any, chance: random.Random, words: tuple[str, ...]) -> Any:
    """Another number instead of a number, another text instead of a text."""
    if isinstance(value, (int, float)):
        return chance.choice(_NUMBERS)
    if isinstance(value, str):
        return chance.choice(words if words and chance.random() < 0.5 else _TEXTS)
    return _choose_value(chance, words)


def _list_places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, the outermost first."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        begun = len(places)
        for item in level:
            keys = item.keys() if isinstance(item, dict) else range(len(item))
            places += [(item, key) for key in keys]
        below = (item[key] for item, key in places[begun:])
        level = [item for item in below if isinstance(item, (dict, list))]
    return places


def change_value(value: Any, chance: random.Random, words: tuple[str, ...] = ()) -> Any:
    """A JSON value with one to three places changed.

    Args:
        value: It is changed in place.
        chance: Decides what is changed, and how.
        words: Texts that mean something where the value is read.
    """
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = _list_places(value) if isinstance(value, (dict, list)) else []
        if not places or chance.random() < 0.02:
            return _choose_value(chance, words)
        holder, key = chance.choice(places[:_OUTER] if chance.random() < 0.25 else places)
        action = chance.randrange(10)
        if action <= 1:
            holder[key] = _choose_value(chance, words)
        elif action == 2:
            holder[key] = _choose_like(holder[key], chance, words)
        elif action == 3:
            del holder[key]
        elif action == 4:
            _grow(holder, key, chance)
        elif action == 5:
            _nudge(holder, key, chance)
        elif action == 6 and isinstance(holder, dict):  # the same under another name
            name = chance.choice(places)[1] if chance.random() < 0.5 else None
            name = name if isinstance(name, str) else str(_choose_scalar(chance, words))[:600]
            holder[name] = holder.pop(key)
        elif action == 7 and isinstance(holder, dict):
            holder[str(_choose_scalar(chance, words))[:600]] = _choose_value(chance, words)
        else:  # what stands elsewhere, or both in each other's place
            other, there = chance.choice(places)
            here, found = json.loads(_dump(holder[key])), json.loads(_dump(other[there]))
            if action == 8:
                other[there] = here
            holder[key] = found
    return value


def _grow(holder: Any, key: Any, chance: random.Random) -> None:
    """Repeat a place: in a list as it is, in an object under numbered names."""
    count, text = chance.choice(_COUNTS), _dump(holder[key])
    count = min(count, 2 + 12_000 // len(text))
    if isinstance(holder, list):
        holder += [json.loads(text) for _ in range(count)]
    else:
        holder |= {f"{key}{number}": json.loads(text) for number in range(count)}


def _nudge(holder: Any, key: Any, chance: random.Random) -> None:
    """A number one up or down, a text with another character."""
    value = holder[key]
    if isinstance(value, (int, float)):
        step = chance.choice((1, -1))
        holder[key] += step if isinstance(value, int) else step / 2
    elif isinstance(value, str) and value:
        at = chance.randrange(len(value))
        holder[key] = value[:at] + chance.choice((*_TEXTS, "b", "7")) + value[at + 1 :]


def _dump(value: Any) -> str:
    # Python writes NaN, Infinity and half characters, which is what an attacker would do.
    return json.dumps(value, ensure_ascii=True)


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to four places flipped, cut, repeated or filled, or another beginning."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        action = chance.randrange(6) if chance.random() < 0.98 else 6
        if action == 0 and at < len(changed):
            changed[at] = chance.randrange(256)
        elif action == 1:
            del changed[at : at + chance.choice((1, 2, 16, 1_000))]
        elif action == 2:
            changed[at:at] = changed[at : at + chance.choice((1, 8, 64))]
        elif action == 3:
            changed[at:at] = bytes([chance.randrange(256)]) * chance.choice((1, 4, 4_000))
        elif action == 4 and at < len(changed):
            changed[at:at] = changed[at : at + 1] * chance.choice(_REPEATS)
        elif action == 6:
            changed[:4] = chance.choice(_STARTS)
        elif at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def mutate_json(data: bytes, chance: random.Random, words: tuple[str, ...] = ()) -> bytes:
    """A JSON document, changed as a value nine times in ten; `words` as in `change_value`."""
    if chance.random() < 0.1:
        return change_bytes(data, chance)
    try:
        return _dump(change_value(json.loads(data), chance, words)).encode()
    except (ValueError, RecursionError):  # of bytes that are no JSON, or deeper with every turn
        return change_bytes(data, chance)


def mutate_toml(data: bytes, chance: random.Random) -> bytes:
    """A TOML document, changed as a value seven times in ten."""
    if chance.random() < 0.3:
        return change_bytes(data, chance)
    try:
        value = change_value(tomllib.loads(data.decode()), chance)
        return tomli_w.dumps(value).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):  # what TOML cannot hold
        return change_bytes(data, chance)


def mutate_lines(data: bytes, chance: random.Random) -> bytes:
    """Lines of JSON: one is changed, removed, repeated or moved."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    action = chance.randrange(5)
    if action <= 1:
        lines[at] = mutate_json(lines[at], chance)
    elif action == 2:
        del lines[at]
    elif action == 3:
        lines.insert(at, chance.choice(lines))
    else:
        return change_bytes(data, chance)
    return b"\n".join(lines)


def mutate_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file: its header is changed as JSON, its frame or its values as bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    action = chance.randrange(8)
    if action == 0 or len(data) < 8 or length > len(data):
        return change_bytes(data, chance)
    if action == 1:
        wrong = chance.choice((0, 1, length - 1, length + 1, 2**24 + 1, 2**40, 2**63))
        return (max(wrong, 0) % 2**64).to_bytes(8, "little") + header + body
    if action == 2:
        return data[:8] + header + change_bytes(body, chance)
    if action == 3 and len(body) >= 4:
        at = chance.randrange(len(body) // 4) * 4
        special = chance.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
        return data[:8] + header + body[:at] + special + body[at + 4 :]
    changed = mutate_json(header, chance)
    if action >= 6:
        try:
            return lay_out(json.loads(changed), body)
        except (ValueError, RecursionError):  # no JSON any more
            pass
    return len(changed).to_bytes(8, "little") + changed + body


def lay_out(header: Any, body: bytes = b"", *, most: int = 2**20) -> bytes:
    """A safetensors file in which every tensor has the place that its type and shape ask for.

    Args:
        header: JSON value, e.g. {"name": {"dtype": "F32", "shape": [2, 3]}}. What is no tensor, or
            one beyond the limit, stays as it is.
        body: Bytes of the values; zeros follow as far as they are needed.
        most: Largest body.
    """
    end = 0
    for name, entry in header.items() if isinstance(header, dict) else ():
        size = None if name == "__metadata__" else _count_bytes(entry)
        if size is not None and end + size <= most:
            entry["data_offsets"] = [end, end + size]
            end += size
    text = _dump(header).encode()
    return len(text).to_bytes(8, "little") + text + body[:end].ljust(end, b"\0")


def _count_bytes(entry: Any) -> int | None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        return None
    return math.prod(shape) * _ITEM_BYTES.get(str(entry.get("dtype")), 1)
