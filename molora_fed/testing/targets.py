"""What all conformance kits share: a target made with its options, other chance, fitting checks."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from molora_fed.errors import PluginError
from molora_fed.guard import one_line
from molora_fed.storage.settings import describe_offenders
from molora_fed.testing.findings import CheckResult, examine

__all__ = ["Target", "describe_target", "examine_target", "open_target", "other_chance"]


def open_target(target: Any, options: Any = None) -> Any:
    """The callable of a registered target: a function, or a class with options opened with them.

    Args:
        target: What is registered.
        options: An instance of the class's `Options`; its defaults if None.

    Raises:
        PluginError: If a function is given options.
    """
    if isinstance(target, type):
        opened: Any = target
        return opened(opened.Options() if options is None else options)
    if options is not None:
        raise PluginError(
            f"Cannot give options to '{getattr(target, '__name__', target)}': expected a class "
            "with Options, got a function. Make it a class, or give none."
        )
    return target


@dataclass(frozen=True)
class Target:
    """What is checked: a class with options, or a function.

    Attributes:
        target: As it is registered.
        options: Of a class; its defaults if None.
    """

    target: Any
    options: Any = None

    def make(self) -> Any:
        """The function, or a fresh instance of the class with its options."""
        return open_target(self.target, self.options)


Case = TypeVar("Case", bound=Target)


def examine_target(
    checks: Sequence[Callable[[Case], str | None]],
    case: Case,
    *,
    contract: Callable[[Any], str | None],
) -> tuple[CheckResult, ...]:
    """Run all checks of a kit; where the target cannot even be made, that is the only result.

    Args:
        checks: Each describes what it found wrong, or gives None.
        case: What they look at.
        contract: What is asked of the target itself, before it is called.
    """

    def can_be_made(case: Case) -> str | None:
        if (problem := contract(case.target)) is not None:
            return problem
        try:
            case.make()
        except ValidationError as error:
            found = describe_offenders(error)
            return f"expected options that are given or have a default, got {found}"
        except Exception as error:  # whatever its class raises
            found = f"{type(error).__name__}: {one_line(str(error))}"
            return f"expected a target that its options make, got {found}"
        return None

    (made,) = examine([can_be_made], case)
    return (made,) if made.problem is not None else (made, *examine(checks, case))


def describe_target(kind: str, target: Any) -> str:
    """What a message calls a target, e.g. "Judge 'MyJudge'".

    Args:
        kind: Noun of its registry.
        target: As it is registered.
    """
    name = getattr(target, "__name__", None) or (
        target if isinstance(target, str) else type(target).__name__
    )
    return f"{kind.capitalize()} '{name}'"


@contextmanager
def other_chance(seed: int | None = None) -> Iterator[None]:
    """Seed the global generators while the block runs, torch's too where it is loaded.

    What draws from them gives something else in a block of another seed.

    Args:
        seed: Seed of them all; one that they were not seeded with if None.
    """
    torch: Any = sys.modules.get("torch")
    states = (random.getstate(), np.random.get_state())
    kept = None if torch is None else torch.get_rng_state()
    if seed is None:
        seed = random.randrange(2**31)
        while torch is not None and seed == torch.initial_seed():
            seed += 1
    try:
        random.seed(seed)
        np.random.seed(seed)
        if torch is not None:
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch is not None:
            torch.set_rng_state(kept)
