"""Pins: which plugins of others a charter's figures rest on, and whether the same are here.

The core's own plugins are not pinned, see docs/decisions/009-only-plugins-of-others-are-pinned.md.
"""

from collections.abc import Iterable, Iterator

from packaging.utils import canonicalize_name
from pydantic import ValidationError

from molora_fed.charter import Charter, PluginPin
from molora_fed.errors import PluginError, describe_mismatch, list_offenders
from molora_fed.plugins import Entry, Plugins, Registry
from molora_fed.storage.distributions import find_installed
from molora_fed.storage.plugin_sources import PluginFile, list_plugin_files
from molora_fed.storage.settings import describe_offenders

__all__ = ["build_pins", "check_pins", "list_named"]


def list_named(charter: Charter, plugins: Plugins) -> Iterator[tuple[Registry, str]]:
    """Every name in a charter that must be registered, with the registry that it is looked up in.

    Args:
        charter: Whose names.
        plugins: The registries.
    """
    fusion, population = charter.amendment.fusion, charter.amendment.population
    if fusion.mode == "population":
        yield plugins.adapter_routers, population.router
        yield plugins.fitness_scopes, population.scope.name
        yield from ((plugins.lifecycle_operators, one.name) for one in population.lifecycle)
    yield from ((plugins.adapter_kinds, name) for name in charter.identity.adapters.kinds)
    yield plugins.routers, fusion.router
    for registry, choices in (
        (plugins.routers, fusion.compare),
        (plugins.merges, fusion.merges),
        (plugins.carried_files, fusion.carried),
        (plugins.admission_checks, charter.amendment.admission.checks),
    ):
        yield from ((registry, choice.name) for choice in choices)


def build_pins(charter: Charter, plugins: Plugins, *, renew: bool = False) -> tuple[PluginPin, ...]:
    """Pins of all plugins of others that a charter names, as they are installed here.

    Plugins that a script handed over have no files to pin, and get none.

    Args:
        charter: Names routers, merges, checks, kinds, operators; has pins of an earlier amendment.
        plugins: Where they are registered.
        renew: Whether a plugin that changed since it was pinned is pinned as it is now.

    Raises:
        PluginError: If one changed and is not renewed, cannot be pinned, or is missing where a name
            is unknown.
    """
    if any(name not in registry.names() for registry, name in list_named(charter, plugins)):
        # Says which package to install; without one the unknown name is refused elsewhere.
        check_pins(charter, plugins)
    found: dict[str, PluginPin] = {}
    for entry in _list_foreign(charter, plugins):
        pin = _build_pin(entry)
        if pin is not None:
            found[canonicalize_name(pin.name)] = pin
    if not renew:
        kept = [pin for pin in charter.amendment.plugins if canonicalize_name(pin.name) in found]
        _raise_offenders(charter, _compare(kept, plugins), "Pin what is installed here with --pin")
    return tuple(found[name] for name in sorted(found))


def check_pins(charter: Charter, plugins: Plugins) -> None:
    """Refuse to go on with other plugins than those that a charter pins.

    Charters without pins, those of earlier versions among them, ask for nothing.

    Args:
        charter: The charter that counts.
        plugins: What is registered here.

    Raises:
        PluginError: Naming every plugin that is missing or another one, or that registers a name
            of the charter without being pinned.
    """
    if not charter.amendment.plugins:
        return
    offenders = _compare(charter.amendment.plugins, plugins)
    pinned = {canonicalize_name(pin.name) for pin in charter.amendment.plugins}
    for entry in _list_foreign(charter, plugins):
        name = _find_source(entry)
        if name is not None and canonicalize_name(name) not in pinned:
            offenders.append(
                (f"no {entry.kind} '{entry.name}' of plugins without a pin", f"that of {name}", "")
            )
    _raise_offenders(
        charter, offenders, "Or have the coordinator pin another with `molora coop amend --pin`"
    )


def _list_foreign(charter: Charter, plugins: Plugins) -> Iterator[Entry]:
    """What a charter names of plugins that are not the core's; unknown names are left out."""
    fusion = charter.amendment.fusion
    # These may be missing: the fallback is looked for where it is needed, forecasts are compared.
    optional = [(plugins.routers, fusion.fallback)]
    optional += [(plugins.gain_predictors, name) for name in fusion.headline]
    for registry, name in (*list_named(charter, plugins), *optional):
        if name in registry.names() and not registry.entry(name).is_own:
            yield registry.entry(name)


def _find_file(entry: Entry) -> PluginFile | None:
    return next((file for file in list_plugin_files() if file.origin == entry.origin), None)


def _find_source(entry: Entry) -> str | None:
    """Name of the file or distribution that registered something; None of a script's."""
    file = _find_file(entry)
    if file is not None:
        return file.name
    return entry.distribution if entry.version and find_installed(entry.distribution) else None


def _build_pin(entry: Entry) -> PluginPin | None:
    """The pin of what registered something; None if it has no files."""
    name = _find_source(entry)
    if name is None:
        return None
    file = _find_file(entry)
    try:
        if file is not None:
            return PluginPin(name=file.name, hash=file.hash())
        installed = find_installed(name)
        assert installed is not None
        return PluginPin(name=installed.name, version=installed.version, hash=installed.hash())
    except ValidationError as error:
        raise PluginError(
            f"Cannot pin {entry.title}: expected a distribution's name and version of letters, "
            f"digits, dots, dashes and +, got {describe_offenders(error)}. Rename it."
        ) from error


def _compare(pins: Iterable[PluginPin], plugins: Plugins) -> list[tuple[str, str, str]]:
    """What differs here from pins: expected, got, and what to do."""
    files = {canonicalize_name(file.name): file for file in list_plugin_files()}
    # Nothing else is hashed: a charter from outside may name any distribution.
    known = {canonicalize_name(one.distribution) for one in plugins.found if one.distribution}
    offenders = []
    for pin in pins:
        digits = f"with the hash {pin.hash[:12]}"
        if not pin.version:
            file = files.get(canonicalize_name(pin.name))
            expected = f"the one-file plugin {pin.name} {digits}"
            advice = f"Get it from the coordinator, and pass it with `molora --plugin {pin.name}`"
            got = "none" if file is None else file.hash()[:12]
            if file is None or file.hash() != pin.hash:
                offenders.append((expected, got, advice))
            continue
        is_known = canonicalize_name(pin.name) in known
        installed = find_installed(pin.name) if is_known else None
        advice = f"Install the charter's with `pip install {pin.name}=={pin.version}`"
        if installed is None:
            offenders.append((f"the plugin {pin.title}", "none installed", advice))
        elif installed.version != pin.version:
            offenders.append((f"the plugin {pin.title}", installed.version, advice))
        elif installed.hash() != pin.hash:
            got = f"other files with {installed.hash()[:12]}"
            offenders.append((f"the plugin {pin.title} {digits}", got, f"{advice} anew"))
    return offenders


def _raise_offenders(
    charter: Charter, offenders: list[tuple[str, str, str]], otherwise: str
) -> None:
    if offenders:
        advice = [text for _, _, text in offenders if text]
        raise PluginError(
            describe_mismatch(
                f"Cannot use charter '{charter.identity.name}'",
                expected=list_offenders([want for want, _, _ in offenders]),
                got=list_offenders([got for _, got, _ in offenders]),
                fix=" ".join(f"{text}." for text in (*advice[:3], otherwise)),
            )
        )
