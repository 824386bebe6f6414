"""What the first-party actions are called, where they are, and what task keys hash of them.

A task's key hashes its action, and caches and published results carry keys. So an action has an id
that stays when its function moves or is renamed, and the path it had when results were first
published stands for it in every key. A new action needs no former path: its id is hashed.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molora_fed.errors import StudyError

__all__ = ["ACTIONS", "ActionPlace", "get_hashed_name", "load_action"]


@dataclass(frozen=True)
class ActionPlace:
    """Where an action is, and what stands for it in task keys.

    Attributes:
        target: "module:function" today.
        hashed: Its name in task keys; never changed.
    """

    target: str
    hashed: str


_FUNCTIONS = (
    # module in this package, module when results were first published, functions
    (
        "framework.actions",
        "molora_fed.studies.actions",
        "make_base apply_to_base prepare_domain train_domain train_pooled",
    ),
    ("framework.fusions", "molora_fed.studies.fusions", "fuse_members average_fusions"),
    (
        "kalavai.adapter_actions",
        "molora_kalavai.studies.adapter_actions",
        "screen_variants derive_adapter train_recipe compare_fusions",
    ),
    (
        "kalavai.baselines",
        "molora_kalavai.studies.baselines",
        "measure_model continue_whole train_joint",
    ),
    ("kalavai.comparisons", "molora_kalavai.studies.comparisons", "compare_methods"),
    ("kalavai.pilot", "molora_kalavai.studies.pilot", "measure_pilots"),
    ("kalavai.published", "molora_kalavai.studies.published", "forecast_published"),
    ("kalavai.refits", "molora_kalavai.studies.refits", "prepare_part refit_routers"),
    ("kalavai.shared_init", "molora_kalavai.studies.shared_init", "rebase_adapter"),
    ("kalavai.twenty_run", "molora_kalavai.studies.twenty_run", "run_twenty"),
    (
        "evolution.substrate_actions",
        "molora_evolution.studies.substrate_actions",
        "make_states perturb_base evolve_population",
    ),
    (
        "evolution.guard_actions",
        "molora_evolution.studies.guard_actions",
        "evolve_and_keep evolve_beside plant_operators",
    ),
    ("evolution.sandbox", "molora_evolution.studies.sandbox", "search_channels"),
    ("acar.models", "molora_acar.studies.acar_models", "make_checkpoint train_member"),
    ("acar.answers", "molora_acar.studies.acar_answers", "collect_answers"),
    ("acar.outcomes", "molora_acar.studies.acar_outcomes", "decide_all"),
)

ACTIONS: Mapping[str, ActionPlace] = {
    function.replace("_", "-"): ActionPlace(
        f"molora_studies.{module}:{function}", f"{former}:{function}"
    )
    for module, former, functions in _FUNCTIONS
    for function in functions.split()
}
"""By id, e.g. "train-domain"."""


def get_hashed_name(action: str) -> str:
    """What stands for an action in task keys: an action that is no id stands for itself."""
    return ACTIONS[action].hashed if action in ACTIONS else action


def load_action(action: str) -> Any:
    """Import an action's function.

    Args:
        action: An id, or "module:function".

    Raises:
        StudyError: If there is no such function.
    """
    target = ACTIONS[action].target if action in ACTIONS else action
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StudyError(f"expected a function '{target}', got {error}") from error
