"""From the description of a cascade to its models, policy and judge, and where they run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora_fed import __version__
from molora_fed.cascade.config import (
    BaseSource,
    CascadeConfig,
    EndpointSource,
    EvolvedSource,
    FusedSource,
    ModelSource,
    PromptTemplate,
    SpecialistSource,
)
from molora_fed.cascade.contract import (
    CascadeModel,
    EscalationPolicy,
    open_extractor,
    open_judge,
)
from molora_fed.cascade.escalation import Lineup
from molora_fed.cascade.retrieval import Retrieval
from molora_fed.cascade.running import Cascade, CascadeSettings
from molora_fed.cascade.task_files import load_examples
from molora_fed.errors import CascadeError
from molora_fed.guard import guarded
from molora_fed.plugins import Plugins
from molora_fed.storage.compute import Compute
from molora_fed.storage.settings import open_options

__all__ = [
    "build_cascade",
    "build_models",
    "build_policy",
    "describe_run_environment",
    "place_files",
]


def build_models(
    config: CascadeConfig, root: Path, plugins: Plugins, compute: Compute | None = None
) -> dict[str, CascadeModel]:
    """Load every model of a description; each base is loaded once.

    Args:
        config: The description.
        root: Folder that paths are relative to.
        plugins: Where adapter kinds and routers are registered.
        compute: Where local models run, and in which dtype.

    Raises:
        CascadeError: If a model cannot be found.
        MoloraError: Whatever loading it refuses.
    """
    loader = _Loader(root, plugins, compute or Compute())
    return {name: loader.load(name, source) for name, source in sorted(config.models.items())}


class _Loader:
    def __init__(self, root: Path, plugins: Plugins, compute: Compute) -> None:
        self._root = root
        self._compute = compute
        self._plugins = plugins
        self._bases: dict[Path, Any] = {}

    def load(self, name: str, source: ModelSource) -> CascadeModel:
        if isinstance(source, EndpointSource):
            from molora_fed.cascade.endpoint import EndpointModel

            return EndpointModel(name, source)
        return self._load_local(name, source)

    def _load_local(
        self, name: str, source: BaseSource | SpecialistSource | FusedSource | EvolvedSource
    ) -> CascadeModel:
        from molora_fed.cascade.local import LocalModel
        from molora_fed.inference.fused_build import build_causal_lm
        from molora_fed.inference.opening import Model, PlainModel, open_model

        model: Model
        match source:
            case BaseSource():
                model = PlainModel(self._base(source.path))
            case SpecialistSource():
                model = PlainModel(*self._specialist(name, source))
            case FusedSource() | EvolvedSource():
                model = open_model(
                    self._root / source.path,
                    kinds=("fused",) if isinstance(source, FusedSource) else ("evolved",),
                    base_folder=self._optional(source.base),
                    compute=self._compute,
                    plugins=self._plugins,
                )
        return LocalModel(name, build_causal_lm(model))

    def _optional(self, path: Path | None) -> Path | None:
        return None if path is None else self._root / path

    def _base(self, path: Path) -> Any:
        from molora_fed.models.base import load_base
        from molora_fed.models.runtime import choose_placement

        folder = self._root / path
        if (folder / "cooperative.toml").is_file():
            folder = folder / "base"
        known = folder.resolve()
        if known not in self._bases:
            self._bases[known] = load_base(folder, choose_placement(self._compute))
        return self._bases[known]

    def _specialist(self, name: str, source: SpecialistSource) -> tuple[Any, Any]:
        from molora_fed.adapters.files import check_adapter_fits, load_adapter

        if source.path is not None and source.base is not None:
            folder = self._root / source.path
            inner = folder / "adapter"
            base = self._base(source.base)
            adapter = load_adapter(
                inner if inner.is_dir() else folder,
                model=base.model,
                tokenizer=base.tokenizer,
                plugins=self._plugins,
            )
            check_adapter_fits(adapter, base.model)
            return base, adapter
        return self._of_ledger(name, self._root / str(source.cooperative), str(source.contributor))

    def _of_ledger(self, name: str, folder: Path, contributor: str) -> tuple[Any, Any]:
        """Base and adapter of an admitted contribution."""
        from molora_fed.adapters.files import load_adapter
        from molora_fed.contributions.receive import list_stored_files
        from molora_fed.contributions.states import ContributionState
        from molora_fed.cooperative.cooperative import open_cooperative

        cooperative = open_cooperative(folder)
        with cooperative.read_ledger() as ledger:
            admitted = ledger.contributions(ContributionState.ADMITTED)
        entries = [entry for entry in admitted if entry.contributor == contributor]
        known = sorted({entry.contributor for entry in admitted})
        if len(entries) != 1:
            raise CascadeError(
                f"Cannot load model '{name}': expected one admitted contribution of "
                f"'{contributor}' in '{folder}', got {len(entries)}; there are those of "
                f"{', '.join(known) or 'nobody'}. Name one of these."
            )
        stored = cooperative.store.folder(list_stored_files(entries[0])) / "adapter"
        rules = cooperative.charter.identity.adapters
        base = self._base(folder)
        adapter = load_adapter(
            stored, rules=rules, model=base.model, plugins=self._plugins, name=contributor
        )
        return base, adapter


def build_policy(name: str, options: Mapping[str, Any], plugins: Plugins) -> EscalationPolicy:
    """Make an escalation policy.

    Args:
        name: Registered name.
        options: Its options.
        plugins: Where it is registered.

    Raises:
        CascadeError: If it refuses its options.
        UnknownNameError: If nobody registers it.
    """
    fix = "Correct [cascade.policy_options]."
    found = open_options(plugins.escalation_policies, name, options, error=CascadeError, fix=fix)
    entry = plugins.escalation_policies.entry(name)
    with guarded(entry, "construction"):
        policy: EscalationPolicy = found[0](found[1])
    policy.entry = entry
    return policy


def place_files(
    name: str, options: Mapping[str, Any], root: Path, plugins: Plugins
) -> dict[str, Any]:
    """Options of a policy with its files looked for in a folder.

    Args:
        name: Registered name of the policy.
        options: Its options.
        root: Folder that paths are relative to.
        plugins: Where it is registered.

    Raises:
        UnknownNameError: If nobody registers it.
    """
    fields = plugins.escalation_policies.resolve(name).Options.model_fields
    kinds: tuple[Any, ...] = (Path, Path | None)
    files = {key for key, info in fields.items() if info.annotation in kinds}
    return {k: root / str(v) if k in files and v else v for k, v in options.items()}


def build_cascade(
    config: CascadeConfig,
    root: Path,
    plugins: Plugins,
    *,
    extractors: tuple[str, ...],
    models: Mapping[str, CascadeModel] | None = None,
    compute: Compute | None = None,
) -> Cascade:
    """Make a cascade from its description.

    Args:
        config: The description.
        root: Folder that paths are relative to.
        plugins: Where everything is registered.
        extractors: Names that tasks use.
        models: Loaded models; those of the description if None.
        compute: Where local models run, and in which dtype.

    Raises:
        CascadeError: If the description does not hold together.
        UnknownNameError: If it names what nobody registers.
        MoloraError: Whatever loading a model refuses.
    """
    section = config.cascade
    options = place_files(section.policy, section.policy_options, root, plugins)
    policy = build_policy(section.policy, options, plugins)
    judge = open_judge(section.judge, plugins, section.judge_options)
    found = {name: open_extractor(name, plugins) for name in extractors}
    retrieval = None
    if section.retrieval is not None:
        retrieval = Retrieval(
            load_examples(root / section.retrieval.examples),
            threshold=section.retrieval.threshold,
            count=section.retrieval.count,
        )
    settings = CascadeSettings(
        samples=section.samples,
        temperature=section.temperature,
        member_temperature=section.member_temperature,
        max_new_tokens=section.max_new_tokens,
        stop=section.stop,
        seed=section.seed,
        template=PromptTemplate(section.template, section.example),
    )
    return Cascade(
        lineup=Lineup(section.probe, section.members),
        models=build_models(config, root, plugins, compute) if models is None else models,
        policy=policy,
        policy_name=section.policy,
        judge=judge,
        judge_name=section.judge,
        extractors=found,
        settings=settings,
        judge_options=section.judge_options,
        environment=describe_run_environment(compute),
        retrieval=retrieval,
    )


def describe_run_environment(compute: Compute | None = None) -> dict[str, str]:
    """Versions, hardware, device, torch threads, and the dtype if it is not the usual one.

    Args:
        compute: Where local models run, and in which dtype.

    Raises:
        ComputeError: If this machine lacks the device, or the device the dtype.
    """
    import torch

    from molora_fed.models.runtime import choose_placement, describe_environment

    compute = compute or Compute()
    device = choose_placement(compute).device.type
    return {
        "molora-fed": __version__,
        **describe_environment(device),
        "threads": str(torch.get_num_threads()),
        **({"dtype": compute.dtype} if compute.dtype == "bfloat16" else {}),
    }
