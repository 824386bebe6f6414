"""Conformance checks of adapter kinds: a few steps of training on tiny models, written, read back.

What counts is what the adapter does to the model: the logits with what was read back are those of
the trained model.
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molora_fed.adapters.compatibility import applied, find_misfits, find_non_finite
from molora_fed.adapters.contract import AdapterKind
from molora_fed.adapters.files import load_adapter
from molora_fed.adapters.updates import Adapter
from molora_fed.charter import AdapterRules
from molora_fed.errors import AdapterError
from molora_fed.models.layout import block_index, decoder_blocks
from molora_fed.plugins import Entry, Plugins
from molora_fed.testing.findings import (
    CheckResult,
    Remark,
    describe_raised,
    examine,
    refuse_broken,
)
from molora_fed.testing.models import build_tiny_model
from molora_fed.testing.targets import other_chance
from molora_fed.types import ADAPTER_FILES

__all__ = ["check_adapter_kind_conformance", "examine_adapter_kind"]

FULL_RANK = 32
"""No layer of the tiny models has more, so that a truncated decomposition loses nothing."""

STEPS = 3
ROUNDING = 0.02  # of what training changed in the logits
MOST_LOST = 0.25


def check_adapter_kind_conformance(
    kind: type[AdapterKind], options: Mapping[str, Any] | None = None
) -> None:
    """Check an adapter kind against the whole contract, on tiny models.

    Args:
        kind: The class that is registered.
        options: Its options by name; its defaults if None.

    Raises:
        PluginError: Naming every rule that is broken, with what was found.
    """
    title = f"Adapter kind '{getattr(kind, '__name__', kind)}'"
    refuse_broken(title, examine_adapter_kind(kind, options), page="docs/hooks/adapter-kinds.md")


def examine_adapter_kind(
    kind: type[AdapterKind], options: Mapping[str, Any] | None = None
) -> tuple[CheckResult, ...]:
    """What `check_adapter_kind_conformance` finds, one result a check.

    Args:
        kind: The class that is registered.
        options: Its options by name; its defaults if None.
    """
    name = "trains, writes and reads back"
    with tempfile.TemporaryDirectory() as scratch:
        subject = _Subject(kind, options, Path(scratch), AdapterRules(frozen_depth=1))
        try:
            subject.made  # noqa: B018 (what nothing else can be asked without)
        except (Exception, SystemExit) as error:
            problem = f"expected an adapter, got {describe_raised(error)}"
            return (CheckResult(name, problem),)
        return (CheckResult(name), *examine(_CHECKS, subject))


@dataclass(frozen=True, eq=False)
class _Made:
    """What a kind made of a base."""

    base: Any
    before: dict[str, Tensor]
    trained: Any
    folder: Path
    adapter: Any


@dataclass(eq=False)
class _Subject:
    kind: type[AdapterKind]
    options: Mapping[str, Any] | None
    scratch: Path
    rules: AdapterRules

    @cached_property
    def tokens(self) -> Tensor:
        return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))

    @cached_property
    def made(self) -> _Made:
        return self.make("plain")

    def open(self) -> AdapterKind:
        return self.kind(self.options) if self.options else self.kind()

    def make(self, name: str, *, architecture: str = "gpt_neox", rank: int = FULL_RANK) -> _Made:
        """Train a few steps, export, load."""
        kind, base = self.open(), build_tiny_model(architecture)
        before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        trained, parameters = kind.prepare(base, self.rules, rank, seed=3)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(STEPS):
            logits = trained(self.tokens).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.eval()
        folder = self.scratch / name
        kind.export(trained, base, folder, rank, self.rules, base_weights="ab" * 32)
        return _Made(base, before, trained, folder, self.load(folder, self.rules, base))

    def load(self, folder: Path, rules: AdapterRules, base: Any) -> Any:
        """Read a folder as admission and fusion do."""
        accepted = rules.model_copy(update={"kinds": (self.kind.name,)})
        return load_adapter(folder, rules=accepted, model=base, plugins=self.plugins, name="mine")

    @cached_property
    def plugins(self) -> Plugins:
        """Plugins among which the kind alone is registered."""
        plugins = Plugins()
        origin = f"{self.kind.__module__} (being checked)"
        entry = Entry(self.kind.name, self.kind, "Being checked", "own definition", origin)
        plugins.adapter_kinds.add(entry)
        return plugins

    def compute_logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(self.tokens).logits
        return logits


_Check = Callable[[_Subject], str | None]


def _gives_an_adapter_that_fits(subject: _Subject) -> str | None:
    adapter = subject.made.adapter
    if not isinstance(adapter, Adapter):
        return f"expected an Adapter, got {type(adapter).__name__}"
    stated = (adapter.name, adapter.kind, adapter.frozen_depth, adapter.base_weights)
    wanted = ("mine", subject.kind.name, subject.rules.frozen_depth, "ab" * 32)
    if stated != wanted:
        return f"expected name, kind, frozen depth and base {wanted}, got {stated}"
    wrong = find_misfits(adapter, subject.made.base)
    wrong += [f"{name}: NaN or infinity" for name in find_non_finite(adapter)]
    return f"expected an adapter that fits the base, got {'; '.join(wrong[:3])}" if wrong else None


def _starts_as_the_base(subject: _Subject) -> str | None:
    base = build_tiny_model("gpt_neox")
    prepared, parameters = subject.open().prepare(base, subject.rules, 4, seed=1)
    if not parameters or not all(isinstance(p, nn.Parameter) for p in parameters):
        return "expected trained parameters in a list, got none"
    if {id(p) for p in parameters} != {id(p) for p in prepared.parameters() if p.requires_grad}:
        return "expected exactly the trained parameters to require gradients, got others"
    if torch.allclose(
        subject.compute_logits(prepared.eval()), subject.compute_logits(base), atol=1e-5
    ):
        return None
    return "expected the base's logits before the first step, got others"


def _leaves_the_base_as_it_was(subject: _Subject) -> str | None:
    made = subject.made
    now = made.base.state_dict()
    changed = [n for n, t in made.before.items() if n not in now or not torch.equal(t, now[n])]
    if changed or now.keys() != made.before.keys():
        return f"expected the base as it was, got changes of {', '.join(changed[:3]) or 'modules'}"
    if any(parameter.requires_grad for parameter in made.base.parameters()):
        return "expected the base's parameters without gradients, got some that require them"
    return None


def _leaves_frozen_blocks_alone(subject: _Subject) -> str | None:
    prefix, _ = decoder_blocks(subject.made.base)
    depth = subject.rules.frozen_depth
    below = [
        name
        for name in subject.made.adapter.updates
        if (index := block_index(name, prefix)) is None or index < depth
    ]
    if below:
        return f"expected updates of blocks >= {depth} alone, got '{below[0]}'"
    return None


def _what_is_read_back_is_what_was_trained(subject: _Subject) -> str | None:
    lost = []
    for architecture in ("gpt_neox", "gpt2"):  # gpt2 stores its weights transposed
        made = subject.make(f"back-{architecture}", architecture=architecture)
        base = subject.compute_logits(made.base)
        trained = subject.compute_logits(made.trained)
        with applied(made.base, made.adapter) as model:
            found = subject.compute_logits(model)
        change = float((trained - base).norm())
        if change == 0:
            return "expected training to change the model, got the base's logits"
        lost.append(float((found - trained).norm()) / change)
        if not lost[-1] <= MOST_LOST:  # NaN is refused, too
            return (
                f"expected the trained model's logits from what was read back, got "
                f"{100 * lost[-1]:.0f} % of the change lost on {architecture}"
            )
    if max(lost) > ROUNDING:
        return Remark(f"{100 * max(lost):.0f} % of what training changed is lost in writing")
    return None


def _plain_peft_gives_the_same(subject: _Subject) -> str | None:
    """Where the folder is PEFT's, others load it without molora."""
    folder = subject.made.folder
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(config, dict) or "peft_type" not in config:
        return Remark("its folder is not PEFT's format")
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = PeftModel.from_pretrained(build_tiny_model("gpt_neox"), folder).eval()
    with applied(subject.made.base, subject.made.adapter) as model:
        ours = subject.compute_logits(model)
    if torch.allclose(subject.compute_logits(other), ours, atol=1e-4):
        return None
    return "expected PEFT to give the same logits from a folder of its format, got others"


def _same_seed_same_bytes(subject: _Subject) -> str | None:
    first = _read_files(subject.made.folder)
    with other_chance():
        second = _read_files(subject.make("again").folder)
    if first.keys() != second.keys():
        return f"expected the same files, got {sorted(second)} for {sorted(first)}"
    other = [name for name in first if first[name] != second[name]]
    return f"expected equal bytes from equal training, got others in {other[0]}" if other else None


def _writes_known_files_alone(subject: _Subject) -> str | None:
    found = _read_files(subject.made.folder).keys()
    foreign = sorted(found - set(ADAPTER_FILES))
    if foreign:
        return f"expected files among {', '.join(ADAPTER_FILES)}, got {', '.join(foreign)}"
    missing = sorted({"adapter_config.json", "adapter_model.safetensors"} - found)
    return f"expected the file {missing[0]}, got none" if missing else None


def _keeps_limits_of_rank_and_bytes(subject: _Subject) -> str | None:
    made, size = subject.made, subject.made.folder / "adapter_model.safetensors"
    tight = {"bytes": {"max_bytes": max(1, size.stat().st_size // 2)}}
    if made.adapter.max_rank > 1:
        tight["rank"] = {"max_rank": 1}
    for what, limit in tight.items():
        rules = subject.rules.model_copy(update=limit)
        fault = _find_refusal_fault(subject.load, made.folder, rules, made.base)
        if fault is not None:
            return f"expected AdapterError for more {what} than the rules allow, got {fault}"
    return None


def _refuses_hostile_folders(subject: _Subject) -> str | None:
    base = subject.made.base
    for what, change in _HOSTILE.items():
        with _copied(subject.made.folder) as folder:
            change(folder)
            fault = _find_refusal_fault(subject.load, folder, subject.rules, base)
        if fault is not None:
            return f"expected AdapterError for {what}, got {fault}"
    return None


def _find_refusal_fault(work: Callable[..., Any], *arguments: Any) -> str | None:
    """What came instead of an AdapterError, or None."""
    try:
        found = work(*arguments)
    except AdapterError:
        return None
    except (Exception, SystemExit) as error:
        return describe_raised(error)
    return type(found).__name__


def _truncate_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _claim_more_than_there_is(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


_HOSTILE: dict[str, Callable[[Path], Any]] = {
    "weights that are cut short": _truncate_weights,
    "a header that claims a terabyte": _claim_more_than_there_is,
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "a config that is no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "a config that is a list": lambda folder: (folder / "adapter_config.json").write_text("[1]"),
    "weights that are a pickle": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        b"\x80\x04\x95" + 64 * b"\0"
    ),
}


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            (Path(scratch) / path.name).write_bytes(path.read_bytes())
        yield Path(scratch)


def _refuses_unknown_options(subject: _Subject) -> str | None:
    fault = _find_refusal_fault(subject.kind, {"no_such_option": 1})
    return None if fault is None else f"expected AdapterError for an unknown option, got {fault}"


def _suggests_a_learning_rate(subject: _Subject) -> str | None:
    rates = [subject.open().suggest_learning_rate(width) for width in (32, 128, 4096)]
    if all(0 < rate < 1 for rate in rates):
        return None
    return f"expected learning rates between 0 and 1 for widths 32 to 4096, got {rates}"


def _exports_a_checkpoint_if_it_says_so(subject: _Subject) -> str | None:
    """A model of the base's architecture that was fine-tuned elsewhere."""
    if not subject.kind.exports_checkpoints:
        return None
    base, adapter = build_tiny_model("gpt_neox"), subject.made.adapter
    before = subject.compute_logits(base)
    with applied(base, adapter) as model:
        checkpoint = copy.deepcopy(model)
        expected = subject.compute_logits(model)
    folder = subject.scratch / "checkpoint"
    subject.open().export(checkpoint, base, folder, FULL_RANK, subject.rules)
    with applied(base, subject.load(folder, subject.rules, base)) as model:
        lost = float((subject.compute_logits(model) - expected).norm())
    if lost <= MOST_LOST * float((expected - before).norm()):
        return None
    return "expected the checkpoint's logits from its export, got others"


_CHECKS: tuple[_Check, ...] = (
    _gives_an_adapter_that_fits,
    _starts_as_the_base,
    _leaves_the_base_as_it_was,
    _leaves_frozen_blocks_alone,
    _what_is_read_back_is_what_was_trained,
    _plain_peft_gives_the_same,
    _same_seed_same_bytes,
    _writes_known_files_alone,
    _keeps_limits_of_rank_and_bytes,
    _refuses_hostile_folders,
    _refuses_unknown_options,
    _suggests_a_learning_rate,
    _exports_a_checkpoint_if_it_says_so,
)


def _read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
