"""What a fused model is made of, as a configuration of transformers: enough to build it empty."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from transformers import AutoConfig, PreTrainedConfig

from molora_fed.charter import BaseIdentity
from molora_fed.errors import RoutingError
from molora_fed.inference.expert_layers import LayerPlan
from molora_fed.plugins import Entry, get_plugins
from molora_fed.routing.top_k import limit_experts
from molora_fed.storage.settings import StrictModel, describe_offenders
from molora_fed.types import Mixture

__all__ = ["FusedConfig", "find_config", "make_router"]

_TAKEN_OVER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "initializer_range",
)


_Text = Annotated[str, Field(max_length=300)]
_Rank = Annotated[int, Field(ge=0, le=65_536)]
_Size = Annotated[int, Field(ge=1, le=2**31)]


class _Expert(StrictModel):
    name: Annotated[str, Field(min_length=1, max_length=300)]
    domain: _Text | None = None
    contribution: _Text | None = None
    adapter: _Text | None = None


class _Layer(StrictModel):
    ranks: Annotated[list[_Rank | None], Field(max_length=10_000)]
    biases: bool


class _Router(StrictModel):
    name: _Text
    options: dict[str, Any]
    top_k: Annotated[int, Field(ge=1)] | None = None
    shapes: Annotated[
        dict[_Text, Annotated[list[_Size], Field(max_length=8)]], Field(max_length=1_000)
    ] = Field(default_factory=dict)


class _Described(StrictModel):
    """What a configuration may say; a file from outside is refused otherwise."""

    mixes: Literal["distributions", "updates"]
    experts: Annotated[list[_Expert], Field(min_length=1, max_length=10_000)]
    layers: Annotated[dict[_Text, _Layer], Field(max_length=100_000)]
    router: _Router | None
    mixture: Mixture
    frozen_depth: Annotated[int, Field(ge=0, le=100_000)]
    document_end: Annotated[int, Field(ge=0)] | None
    base_identity: BaseIdentity | None
    made_from: Annotated[list[Any], Field(min_length=1)] | None
    base_path: _Text | None


_DESCRIBED = TypeAdapter(_Described)


class FusedConfig(PreTrainedConfig):
    """Configuration of a `FusedForCausalLM`.

    Attributes:
        base_config: The base's own configuration, as a dictionary with its `model_type`.
        mixes: What is mixed: "distributions" (the experts' outputs) or "updates" (a population's
            changes inside the layers).
        experts: Experts or slots in the order of the gates: name, domain, contribution, hash.
        layers: Which experts change which layer: {name: {"ranks": [...], "biases": bool}}; a rank
            of 0 is a dense difference, None no change.
        router: Registered name, options, top_k and shapes of what was learned; None where there is
            one expert and nothing to weigh.
        mixture: "probability" or "logit".
        frozen_depth: K.
        document_end: Token id after which a new document begins.
        base_identity: Id, revision and fingerprints of the base; None if it was made by hand.
        made_from: What beside the base and the dtype decides the text, hashes in place of numbers;
            None if it was made by hand.
        base_path: Where the base lies from the model's folder, if it is not inside.
    """

    model_type = "molora-fused"
    use_cache = True

    def __init__(
        self,
        base_config: Mapping[str, Any] | None = None,
        mixes: Literal["distributions", "updates"] = "distributions",
        experts: Sequence[Mapping[str, Any]] = (),
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        router: Mapping[str, Any] | None = None,
        mixture: Mixture = "probability",
        frozen_depth: int = 0,
        document_end: int | None = None,
        base_identity: Mapping[str, Any] | None = None,
        made_from: Sequence[Any] | None = None,
        base_path: str | None = None,
        **others: Any,
    ) -> None:
        self.base_config = dict(base_config or {"model_type": "llama"})
        self.mixes: Literal["distributions", "updates"] = mixes
        self.experts = [dict(expert) for expert in experts] or [{"name": "base"}]
        self.layers = {name: dict(layer) for name, layer in (layers or {}).items()}
        self.router = None if router is None else {"top_k": None, "shapes": {}, **router}
        self.mixture: Mixture = mixture
        self.frozen_depth = frozen_depth
        self.document_end = document_end
        self.base_identity = None if base_identity is None else dict(base_identity)
        self.made_from = None if made_from is None else list(made_from)
        self.base_path = base_path
        self._check()
        base = self.make_base_config()
        for name in _TAKEN_OVER:
            if hasattr(base, name):
                others.setdefault(name, getattr(base, name))
        super().__init__(**others)

    def _check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            RoutingError: If a value is malformed, or a layer's ranks are not one an expert.
        """
        try:
            _DESCRIBED.validate_python(
                {name: getattr(self, name) for name in _Described.model_fields}
            )
        except ValidationError as error:
            raise RoutingError(
                "Cannot build a fused model: expected a valid config.json, got "
                f"{describe_offenders(error, whole='config.json')}. Save the model again."
            ) from error
        count = len(self.experts)
        wrong = [name for name, layer in self.layers.items() if len(layer["ranks"]) != count]
        if wrong or (self.router is None and count > 1):
            what = f"{len(wrong)} layers with others" if wrong else "no router"
            raise RoutingError(
                f"Cannot build a fused model: expected ranks and a router for {count} experts, got "
                f"{what}. Save the model again."
            )

    def make_base_config(self) -> Any:
        """The base's configuration as an object."""
        values = dict(self.base_config)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def plan(self) -> dict[str, LayerPlan]:
        """Which experts change which layers, and how."""
        return {
            name: LayerPlan(tuple(layer["ranks"]), bool(layer["biases"]))
            for name, layer in self.layers.items()
        }


def make_router(config: FusedConfig, count: int) -> tuple[Any, Entry | None]:
    """An empty router as the configuration describes it."""
    described = config.router or {}
    plugins = get_plugins()
    # On the CPU, wherever the rest is made: routers have tensors that are no parameters.
    with torch.device("cpu"):
        if config.mixes == "updates":
            registered = plugins.adapter_routers.resolve(described["name"])
            options = registered.Options.model_validate(described["options"])
            entry = plugins.adapter_routers.entry(described["name"])
            return registered.build(count, config.hidden_size, options, 0), entry
        router_class = plugins.routers.resolve(described["name"])
        entry = plugins.routers.entry(described["name"])
        if described["top_k"] is not None:
            router_class = limit_experts(router_class, described["top_k"])
        options = router_class.Options.model_validate(described["options"])
        tensors = {name: torch.zeros(shape) for name, shape in described["shapes"].items()}
        return router_class(count, options, tensors), entry


def find_config(folder: Path) -> FusedConfig | None:
    """The configuration that `save_pretrained` wrote, or None."""
    if not (folder / "config.json").is_file():  # nothing is looked for anywhere else
        return None
    try:
        values, _ = FusedConfig.get_config_dict(folder, local_files_only=True)
    except OSError:
        return None
    if values.get("model_type") != FusedConfig.model_type:
        return None
    found: FusedConfig = FusedConfig.from_pretrained(folder)
    return found
