"""molora-fed: post-hoc fusion of independently trained specialists.

What a plugin or a script imports is here; each name is loaded when it is first used. Importing
this package loads neither torch, transformers nor flwr. Tests of plugins find their conformance
kits in `molora_fed.testing`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from molora_fed.plugins import hookimpl

if TYPE_CHECKING:
    from molora_fed.adapters.compatibility import applied as applied
    from molora_fed.adapters.contract import AdapterKind as AdapterKind
    from molora_fed.adapters.updates import Adapter as Adapter
    from molora_fed.bank import CalibrationBank as CalibrationBank
    from molora_fed.bank.views import GateView as GateView
    from molora_fed.bank.views import RouterView as RouterView
    from molora_fed.cascade.contract import CascadeModel as CascadeModel
    from molora_fed.cascade.contract import CascadeTask as CascadeTask
    from molora_fed.cascade.contract import EscalationPolicy as EscalationPolicy
    from molora_fed.cascade.contract import Judge as Judge
    from molora_fed.cascade.contract import JudgeOptions as JudgeOptions
    from molora_fed.cascade.contract import JudgeRequest as JudgeRequest
    from molora_fed.cascade.contract import PolicyOptions as PolicyOptions
    from molora_fed.cascade.contract import ProbeEvidence as ProbeEvidence
    from molora_fed.cascade.contract import Verdict as Verdict
    from molora_fed.contributions.admission import AdmissionCandidate as AdmissionCandidate
    from molora_fed.contributions.admission import Stage as Stage
    from molora_fed.contributions.admission import needs as needs
    from molora_fed.contributions.carried import CarriedContext as CarriedContext
    from molora_fed.cooperative.cooperative import open_cooperative as open_cooperative
    from molora_fed.cooperative.fuse import fuse_contributions as fuse_contributions
    from molora_fed.errors import MoloraError as MoloraError
    from molora_fed.evaluation.evaluate import Evaluation as Evaluation
    from molora_fed.evaluation.evaluate import evaluate as evaluate
    from molora_fed.hookspecs import Register as Register
    from molora_fed.inference.fused_lm import FusedForCausalLM as FusedForCausalLM
    from molora_fed.models.base import Base as Base
    from molora_fed.models.base import load_base as load_base
    from molora_fed.models.block_input import InputNorm as InputNorm
    from molora_fed.population.contract import AdapterRouter as AdapterRouter
    from molora_fed.population.contract import AdapterRouterOptions as AdapterRouterOptions
    from molora_fed.population.contract import Birth as Birth
    from molora_fed.population.contract import Fitness as Fitness
    from molora_fed.population.contract import LifecycleOperator as LifecycleOperator
    from molora_fed.population.contract import LifecycleState as LifecycleState
    from molora_fed.population.contract import LossTable as LossTable
    from molora_fed.population.contract import OperatorOptions as OperatorOptions
    from molora_fed.population.contract import Population as Population
    from molora_fed.population.contract import Slot as Slot
    from molora_fed.routing.bundle import load_fused as load_fused
    from molora_fed.routing.contract import OutputRouter as OutputRouter
    from molora_fed.routing.contract import RouterOptions as RouterOptions
    from molora_fed.routing.contract import RouterState as RouterState
    from molora_fed.routing.fitting import fit_on_batches as fit_on_batches
    from molora_fed.routing.fitting import fit_on_whole as fit_on_whole
    from molora_fed.routing.fused import FusedModel as FusedModel
    from molora_fed.routing.summed import FitSetting as FitSetting
    from molora_fed.routing.summed import NoRounds as NoRounds
    from molora_fed.storage.options import Configurable as Configurable
    from molora_fed.storage.options import PluginOptions as PluginOptions
    from molora_fed.types import Case as Case
    from molora_fed.types import Document as Document
    from molora_fed.types import Finding as Finding
    from molora_fed.types import Forecast as Forecast
    from molora_fed.types import LossMatrix as LossMatrix
    from molora_fed.types import Outcome as Outcome
    from molora_fed.types import Progress as Progress

__version__ = "0.1.0"

_NAMES = {
    "adapters.compatibility": ("applied",),
    "adapters.contract": ("AdapterKind",),
    "adapters.updates": ("Adapter",),
    "bank": ("CalibrationBank",),
    "bank.views": ("GateView", "RouterView"),
    "cascade.contract": (
        "CascadeModel", "CascadeTask", "EscalationPolicy", "Judge", "JudgeOptions", "JudgeRequest",
        "PolicyOptions", "ProbeEvidence", "Verdict",
    ),
    "contributions.admission": ("AdmissionCandidate", "Stage", "needs"),
    "contributions.carried": ("CarriedContext",),
    "cooperative.cooperative": ("open_cooperative",),
    "cooperative.fuse": ("fuse_contributions",),
    "errors": ("MoloraError",),
    "evaluation.evaluate": ("Evaluation", "evaluate"),
    "hookspecs": ("Register",),
    "inference.fused_lm": ("FusedForCausalLM",),
    "models.base": ("Base", "load_base"),
    "models.block_input": ("InputNorm",),
    "storage.options": ("Configurable", "PluginOptions"),
    "population.contract": (
        "AdapterRouter", "AdapterRouterOptions", "Birth", "Fitness", "LifecycleOperator",
        "LifecycleState", "LossTable", "OperatorOptions", "Population", "Slot",
    ),
    "routing.bundle": ("load_fused",),
    "routing.contract": ("OutputRouter", "RouterOptions", "RouterState"),
    "routing.fitting": ("fit_on_batches", "fit_on_whole"),
    "routing.fused": ("FusedModel",),
    "routing.summed": ("FitSetting", "NoRounds"),
    "types": (
        "Case", "Document", "Finding", "Forecast", "LossMatrix", "Outcome", "Progress",
    ),
}  # fmt: skip
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", "hookimpl", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    """Load a public name on first use.

    Raises:
        AttributeError: If there is none of this name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
