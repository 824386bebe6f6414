"""Amending a cooperative from "key=value": what changes is checked whole before it is signed."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from molora_fed.charter import Amendment, Charter
from molora_fed.cooperative.cooperative import (
    Cooperative,
    amend_cooperative,
    check_charter_names,
)
from molora_fed.errors import CharterError, describe_mismatch
from molora_fed.options import Choice
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.storage.settings import describe_offenders
from molora_fed.storage.values import parse_names

__all__ = ["Change", "amend_by_settings", "apply_settings", "list_changes"]

ACTOR = "molora coop amend"
_NONE = "none"
# Keys that say whose the options beside them are.
_OWNERS = (("fusion", "router"), ("population", "router"), ("training", "kind"))
_FIX = "Write it like training.steps=600; keys are those of [amendment] in cooperative.toml."


@dataclass(frozen=True)
class Change:
    """One key that an amendment changes, with both values as the charter would show them."""

    key: str
    before: Any
    after: Any


def amend_by_settings(
    cooperative: Cooperative, settings: Sequence[str], *, plugins: Plugins | None = None
) -> tuple[Cooperative, list[Change]]:
    """Sign the next amendment of a cooperative; nothing is signed if nothing would change.

    Args:
        cooperative: What to amend; no server may work on it.
        settings: "key=value", e.g. "fusion.router=linear"; see `apply_settings`.
        plugins: Where names are looked up; the installed plugins by default.

    Returns:
        The cooperative with the amendment that counts now, and what changed.

    Raises:
        CharterError: If a setting is malformed, out of range, unknown, contradicts `[identity]` or
            is none of its router's options.
        PopulationError: The same of a population's router or operators.
        UnknownNameError: If a router, kind or check is registered by nobody.
        LedgerError: If a server works on the cooperative.
        SignatureError: If the coordinator's key is missing or another one.
    """
    from molora_fed.fusion.plan import build_routers

    plugins = plugins or get_plugins()
    current = cooperative.charter.amendment
    changed = apply_settings(current, settings)
    changes = list_changes(current, changed)
    if not changes:
        return cooperative, []
    following = changed.model_copy(update={"number": current.number + 1})
    draft = Charter(identity=cooperative.charter.identity, amendment=following)
    with cooperative.open_ledger() as ledger:
        # Refused now, not when everybody waits for the fusion.
        check_charter_names(draft, plugins)
        build_routers(draft, plugins)
        _check_population(draft, plugins)
        amended = amend_cooperative(cooperative, ledger, following, plugins=plugins, actor=ACTOR)
    return amended, changes


def _check_population(charter: Charter, plugins: Plugins) -> None:
    """Refuse options that the router or an operator of a population does not know."""
    if charter.amendment.fusion.mode == "population":
        from molora_fed.population.lifecycle import open_operators
        from molora_fed.population.router_files import parse_router_options

        rules = charter.amendment.population
        parse_router_options(rules.router, rules.options, plugins)
        open_operators([(one.name, one.options) for one in rules.lifecycle], plugins)


def apply_settings(amendment: Amendment, settings: Sequence[str]) -> Amendment:
    """Set keys of an amendment; its number stays.

    Values are TOML; a bare word is text, words separated by commas are a list where the key holds
    one, and `none` unsets a key that may be unset: a number, a list, options or one of them. With
    another router, scope or kind the options of the one before go, whatever the order.

    Args:
        amendment: Where to begin.
        settings: "key=value" with the key's full path, e.g. "samples.calibration=200".

    Raises:
        CharterError: If one is malformed or out of range, or there is no such key; offending keys
            are named.
    """
    changed: Any = amendment
    parsed: list[tuple[list[str], str, str]] = []
    for setting in settings:
        key, separator, text = setting.partition("=")
        path = key.strip().split(".")
        if not separator or not all(path) or path == ["number"]:
            raise CharterError(
                describe_mismatch(
                    "Cannot amend the charter",
                    expected="KEY=VALUE, where KEY is not the number",
                    got=f"'{setting}'",
                    fix=_FIX,
                )
            )
        parsed.append((path, text.strip(), key.strip()))
    # What stands above goes first, so that options are those of what they are given with.
    for path, text, key in sorted(parsed, key=_order):
        before, changed = changed, _set(changed, path, text, key)
        if tuple(path) in _OWNERS:
            changed = _drop_options(before, changed, path)
    try:
        return Amendment.model_validate(changed.model_dump(warnings=False))
    except ValidationError as error:
        raise CharterError(
            describe_mismatch(
                "Cannot amend the charter",
                expected="valid values",
                got=describe_offenders(error, whole="amendment"),
                fix=_FIX,
            )
        ) from error


def _order(setting: tuple[Sequence[str], str, str]) -> tuple[int, bool]:
    path = setting[0]
    return len(path), tuple(path) not in _OWNERS


def _drop_options(before: Any, after: Any, path: Sequence[str]) -> Any:
    """An amendment without the options of what another one is chosen for now."""
    place, name = path
    old, new = getattr(before, place), getattr(after, place)
    if getattr(old, name) == getattr(new, name):
        return after
    return after.model_copy(update={place: new.model_copy(update={"options": {}})})


def _set(value: Any, path: Sequence[str], text: str, key: str) -> Any:
    """A copy of a value with the parsed text at a path inside it."""
    head, rest = path[0], path[1:]
    if isinstance(value, BaseModel):
        if head not in type(value).model_fields:
            raise _describe_unknown(key)
        old = getattr(value, head)
    elif isinstance(value, dict):
        old = value.get(head, {})
    else:
        raise _describe_unknown(key)
    new = _set(old, rest, text, key) if rest else _parse(text, old, key)
    if isinstance(value, BaseModel):
        return value.model_copy(update={head: new})
    return {name: one for name, one in {**value, head: new}.items() if one is not None}


def _describe_unknown(key: str) -> CharterError:
    known = _list_keys(Amendment())
    near = get_close_matches(key, known, n=3, cutoff=0.5) or known
    return CharterError(
        describe_mismatch(
            "Cannot amend the charter",
            expected=f"a key of [amendment] such as {', '.join(near)}",
            got=f"'{key}'",
            fix="What is in [identity] can never change.",
        )
    )


def _list_keys(value: BaseModel, before: str = "") -> list[str]:
    keys = []
    for name in type(value).model_fields:
        inner = getattr(value, name)
        is_section = isinstance(inner, BaseModel) and not isinstance(inner, Choice)
        below = _list_keys(inner, f"{before}{name}.") if is_section else []
        keys += below or [f"{before}{name}"]
    return keys


def _parse(text: str, old: Any, key: str) -> Any:
    """The value that a text stands for, beside the one it replaces."""
    if text == _NONE:
        return type(old)() if isinstance(old, (tuple, dict)) else None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("[", "{")):
            raise CharterError(
                describe_mismatch(
                    f"Cannot amend the charter, '{key}'",
                    expected="a list or table in TOML",
                    got=f"'{text[:80]}' ({error})",
                    fix='Write it like ["a", {name = "b", label = "b-slow", options = {x = 1}}].',
                )
            ) from error
        if isinstance(old, tuple):
            return parse_names(text) if text else ()
        value = text
    # Made now, so that a further setting reaches into it.
    return Choice(name=value) if isinstance(old, Choice) and isinstance(value, str) else value


def list_changes(before: Amendment, after: Amendment) -> list[Change]:
    """What differs between two amendments, beside their numbers, by key."""
    old, new = (_flatten(one.model_dump(mode="json")) for one in (before, after))
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if key != "number" and old.get(key) != new.get(key)
    ]


def _flatten(value: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {before.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flatten(inner, f"{before}{name}.")
    return flat
