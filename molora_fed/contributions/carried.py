"""What plugins compute for a contribution, and whether one carries what its charter asks for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from molora_fed.adapters.carried_files import encode_carried, find_carried_fault
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import Charter, TrainingRules
from molora_fed.contributions.manifest import Manifest, locate_carried
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import ConfigError, UnknownNameError
from molora_fed.guard import guarded, refuse
from molora_fed.models.frozen import stamp_model
from molora_fed.models.runtime import limit_threads
from molora_fed.plugins import Plugins
from molora_fed.storage.options import Choice, open_choice
from molora_fed.types import Progress, Split

if TYPE_CHECKING:
    from molora_fed.models.base import Base

__all__ = [
    "CarriedContext",
    "check_makers",
    "compute_carried",
    "find_carried_misfits",
]

_READ = (Split.TRAIN, Split.VALIDATION)


@dataclass(frozen=True, eq=False)
class CarriedContext:
    """What a carried file is computed from: all of it is the contributor's own, and at home.

    The base's model is in eval mode, requires no gradients, and is without the adapter; so it must
    be afterwards, with the same weights and the same outputs.

    Attributes:
        base: The cooperative's base.
        adapter: The contributor's adapter, as its contribution has it.
        rules: How the charter has contributors train.
        seed: Of whatever is drawn; the same seed gives the same tensors.
        max_bytes: Largest file that the charter takes.
        samples: Train and validation blocks by split, what `blocks` reads.
        progress: Told steps done and in all; None if nobody listens.
    """

    base: "Base"
    adapter: Adapter
    rules: TrainingRules
    seed: int
    max_bytes: int
    samples: Mapping[Split, Blocks] = field(repr=False)
    progress: Progress | None = None

    def blocks(self, split: Split | str, batch: int = 1) -> Iterator[Blocks]:
        """The contributor's blocks of a split, a batch at a time, in a fixed order.

        Args:
            split: "train" or "validation"; no other text may be learned from.
            batch: B, blocks at a time; the last have what is left.

        Yields:
            Blocks with tokens (B, T) int32.

        Raises:
            ConfigError: If it is another split.
        """
        if split not in _READ:
            raise ConfigError(
                f"Cannot compute a carried file from blocks of split '{split}': expected train or "
                "validation, got text that routers are fitted or measured on. Read train blocks."
            )
        whole = self.samples[Split(split)]
        for start in range(0, len(whole), batch):
            yield whole.select(slice(start, start + batch))


def check_makers(charter: Charter, plugins: Plugins) -> None:
    """Refuse to contribute where a plugin is missing that computes what contributions carry.

    Args:
        charter: Of the cooperative.
        plugins: What is installed here.

    Raises:
        ConfigError: If nobody registers a name, or several.
        PluginError: If a plugin cannot be imported, or what it registers cannot be called.
    """
    missing, failures = [], ""
    for choice in charter.amendment.fusion.carried:
        try:
            plugins.carried_files.resolve(choice.name)
        except UnknownNameError:
            missing.append(f"'{choice.name}'")
            failures = " ".join(("", *map(str, plugins.failures)))
    if missing:
        listed = ", ".join(missing)
        raise ConfigError(
            f"Cannot contribute to cooperative '{charter.identity.name}': expected an installed "
            f"plugin that computes the carried files {listed}, got none. Install the package that "
            f"registers {listed}; the coordinator knows which.{failures}"
        )


def compute_carried(
    choice: Choice, context: CarriedContext, plugins: Plugins, *, threads: int = 1
) -> bytes:
    """The bytes of a carried file; the same context and threads give the same ones.

    Args:
        choice: What the charter names, with its options.
        context: What it is computed from.
        plugins: Where it is registered.
        threads: Torch threads.

    Raises:
        UnknownNameError: If nobody registers it.
        CharterError: If its options are wrong.
        PluginError: If its plugin fails, changes the base, or gives no bounded, finite tensors.
    """
    entry, place = plugins.carried_files.entry(choice.name), "computing it"
    make = open_choice(plugins.carried_files, choice, key="fusion.carried")
    model = context.base.model
    probe = torch.from_numpy(context.samples[Split.VALIDATION].tokens[:1]).long()
    before = stamp_model(model, probe)
    devices = [model.device] if model.device.type == "cuda" else []
    with guarded(entry, place), torch.random.fork_rng(devices), limit_threads(threads):
        torch.manual_seed(context.seed)
        tensors = make(
            replace(
                context,
                samples={split: context.samples[split] for split in _READ},
                progress=_drop_figures(context.progress),
            )
        )
    after = stamp_model(model, probe)
    parts = sorted(before.keys() | after.keys())
    changed = [part for part in parts if before.get(part) != after.get(part)]
    if changed:
        raise refuse(
            entry,
            place,
            expected="a base that stays as it was",
            got=f"changes of {', '.join(changed[:3])}",
        )
    fault = find_carried_fault(tensors)
    if fault is not None:
        raise refuse(entry, place, expected=fault[0], got=fault[1])
    data = encode_carried(tensors)
    if len(data) > context.max_bytes:
        wanted = f"a file of at most {context.max_bytes:,} bytes"
        raise refuse(entry, place, expected=wanted, got=f"{len(data):,}")
    return data


def _drop_figures(progress: Progress | None) -> Progress | None:
    """Progress in steps alone: it is sent, and what a plugin measures of a text is not."""
    if progress is None:
        return None
    report = progress

    def tell(done: int, total: int, **figures: float | str) -> None:
        report(int(done), int(total))

    return tell


def find_carried_misfits(manifest: Manifest, charter: Charter) -> list[tuple[str, str]]:
    """What a charter expects of carried files and what a manifest names, of each that is wrong.

    Args:
        manifest: Of the contribution.
        charter: With the amendment that was in force when it was received.
    """
    rules, carried = charter.amendment.fusion, manifest.carried_files
    wrong = [(locate_carried(name), "none") for name in rules.carried_names if name not in carried]
    for name, entry in carried.items():
        path = locate_carried(name)
        if name not in rules.carried_names:
            wrong.append((f"no {path}, which this cooperative does not ask for", "one"))
        elif entry.bytes > rules.max_carried_bytes:
            most = f"{path} of at most {rules.max_carried_bytes} bytes"
            wrong.append((most, f"{entry.bytes}"))
    return wrong
