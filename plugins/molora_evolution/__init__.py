"""Evolutionary mixture of LoRA (arXiv 2605.11153) on molora-fed's public hooks."""

from molora_fed import hookimpl
from molora_fed.hookspecs import Register

_PAPER = "arXiv 2605.11153"


@hookimpl
def register_adapter_routers(register: Register) -> None:
    """Register the paper's rewritten router and the one before it."""
    own = f"{_PAPER}, abstract; own definition, see docs/populations.md"
    register(
        "parallel-sigmoid",
        "molora_evolution.routers:ParallelSigmoidRouter",
        summary="A sigmoid gate per slot with a learnable floor and a bounded anneal",
        source=own,
    )
    register(
        "softmax-embedding-mean",
        "molora_evolution.routers:SoftmaxEmbeddingMeanRouter",
        summary="Softmax gates on the mean of a document's token embeddings so far",
        source=own,
    )


@hookimpl
def register_fitness_scopes(register: Register) -> None:
    """Register the paper's two scopes."""
    register(
        "global",
        "molora_evolution.scopes:measure_global",
        summary="Loss without the slot less loss with it, over all tokens",
        source=f"{_PAPER}, abstract",
    )
    register(
        "per-domain",
        "molora_evolution.scopes:measure_per_domain",
        summary="The same in the domain where it is largest",
        source=f"{_PAPER}, abstract; combined by own definition, see docs/populations.md",
    )


@hookimpl
def register_lifecycle_operators(register: Register) -> None:
    """Register the paper's lifecycle, one operator a step."""
    own = f"{_PAPER}, abstract; own definition, see docs/populations.md"
    register(
        "death",
        "molora_evolution.operators:Death",
        summary="Frees slots whose fitness stayed below a threshold",
        source=own,
    )
    register(
        "slot-reallocation",
        "molora_evolution.operators:SlotReallocation",
        summary="Gives freed slots to the domains with the largest regret",
        source=own,
    )
    register(
        "inheritance",
        "molora_evolution.breeding:Inheritance",
        summary="Fills freed slots with a share of a parent's product",
        source=own,
    )
    register(
        "crossover",
        "molora_evolution.breeding:Crossover",
        summary="Fills freed slots with layers of two parents",
        source="own definition, see docs/populations.md",
    )
    register(
        "svd-mutation",
        "molora_evolution.breeding:SvdMutation",
        summary="Perturbs singular values and vectors of newborns",
        source=own,
    )
