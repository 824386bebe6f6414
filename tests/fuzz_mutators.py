"""Changes a file as an attacker would: inside its structure first, then in its bytes."""

import json
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
_NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 16, 64, 127, 128, 255, 257, 4096, 2**31, 2**32, 2**53, 2**63 - 1, 2**63,
    -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -1e-300, 1e300, 1e30,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def _choose_scalar(chance: random.Random) -> Any:
    return chance.choice((*_TEXTS, *_NUMBERS, None, True, False))


def _choose_value(chance: random.Random) -> Any:
    kind = chance.randrange(6)
    if kind == 0:
        return [_choose_scalar(chance) for _ in range(chance.choice((0, 1, 2, 50)))]
    if kind == 1:
        return {str(_choose_scalar(chance))[:400]: _choose_scalar(chance) for _ in range(2)}
    if kind == 2:
        deep: Any = _choose_scalar(chance)
        for _ in range(chance.choice((2, 30, 60, 300))):
            deep = [deep] if chance.random() < 0.5 else {"k": deep}
        return deep
    return _choose_scalar(chance)


def _list_places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            keys: Any = item.keys()
        elif isinstance(item, list):
            keys = range(len(item))
        else:
            continue
        for key in keys:
            places.append((item, key))
            level.append(item[key])
    return places


def change_value(value: Any, chance: random.Random) -> Any:
    """A JSON value with one to three places replaced, removed, repeated, renamed or nudged."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = _list_places(value)
        if not places or chance.random() < 0.02:
            return _choose_value(chance)
        holder, key = chance.choice(places)
        action = chance.randrange(7)
        if action <= 2:
            holder[key] = _choose_value(chance)
        elif action == 3:
            del holder[key]
        elif action == 4 and isinstance(holder, list):
            holder += [json.loads(_dump(holder[key]))] * chance.choice((1, 2, 100))
        elif action == 4:
            holder[str(_choose_scalar(chance))[:600]] = _choose_value(chance)
        elif action == 5 and isinstance(holder[key], (int, float)):
            step = chance.choice((1, -1))
            holder[key] += step if isinstance(holder[key], int) else step / 2
        elif action == 5 and isinstance(holder[key], str) and holder[key]:
            text, at = holder[key], chance.randrange(len(holder[key]))
            holder[key] = text[:at] + chance.choice((*_TEXTS, "b", "7")) + text[at + 1 :]
        else:
            other, there = chance.choice(places)
            if key in holder if isinstance(holder, dict) else key < len(holder):
                try:
                    holder[key] = json.loads(_dump(other[there]))
                except (KeyError, IndexError):
                    continue
    return value


def _dump(value: Any) -> str:
    # Python writes NaN, Infinity and half characters, which is what an attacker would do.
    return json.dumps(value, ensure_ascii=True)


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to four places flipped, cut, repeated or filled."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        action = chance.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] = chance.randrange(256)
        elif action == 1:
            del changed[at : at + chance.choice((1, 2, 16, 1_000))]
        elif action == 2:
            changed[at:at] = changed[at : at + chance.choice((1, 8, 64))]
        elif action == 3:
            changed[at:at] = bytes([chance.randrange(256)]) * chance.choice((1, 4, 4_000))
        elif at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON document, changed as a value nine times in ten."""
    if chance.random() < 0.1:
        return change_bytes(data, chance)
    try:
        return _dump(change_value(json.loads(data), chance)).encode()
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
    return len(changed).to_bytes(8, "little") + changed + body
