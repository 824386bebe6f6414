"""Evolving a cooperative's admitted contributions: `molora evolve`, on folders."""

from collections.abc import Callable
from pathlib import Path

from molora_fed.contributions.contributed import collect_contributed
from molora_fed.contributions.receive import load_admitted
from molora_fed.cooperative.cooperative import Cooperative
from molora_fed.cooperative.decisions import begin_fusion, end_fusion
from molora_fed.errors import ConfigError
from molora_fed.models.base import load_base
from molora_fed.plugins import Plugins, get_plugins
from molora_fed.population.setup import EvolutionResult, evolve_contributions
from molora_fed.types import Progress

__all__ = [
    "evolve_cooperative",
]


ACTOR = "molora evolve"


def evolve_cooperative(
    cooperative: Cooperative,
    *,
    out: Path | None = None,
    plugins: Plugins | None = None,
    threads: int = 1,
    on_phase: Callable[[str], None] = lambda phase: None,
    progress: Progress | None = None,
) -> EvolutionResult:
    """Evolve all admitted contributions; killed and called again, it goes on.

    Args:
        cooperative: Whose charter, base and ledger count.
        out: Gets everything; `evolution/` of the cooperative's folder if None.
        plugins: Where everything is registered; the installed plugins by default.
        threads: Torch threads of adaptation.
        on_phase: Told what begins.
        progress: Receives progress within a phase.

    Raises:
        ConfigError: If its texts are private: then the server evolves.
        LedgerError: If another process, such as a server, works on the cooperative.
        MoloraError: Whatever `evolve_contributions` refuses.
    """
    plugins, out = plugins or get_plugins(), out or cooperative.folder / "evolution"
    if cooperative.charter.amendment.is_private:
        raise ConfigError(
            f"Cannot evolve '{cooperative.folder}' here: expected texts that lie here, got a "
            "charter under which they stay with contributors. Run `molora serve`: it evolves once "
            "enough contributions are admitted, while their contributors are connected."
        )
    with cooperative.open_ledger() as ledger:
        on_phase("base")
        base = load_base(cooperative.base_folder)
        admitted = load_admitted(ledger, cooperative.store)
        contributed = [collect_contributed(one) for one in admitted]
        if contributed:
            begin_fusion(ledger, actor=ACTOR)
        result = evolve_contributions(
            base,
            cooperative.charter,
            contributed,
            out,
            plugins=plugins,
            threads=threads,
            on_phase=on_phase,
            progress=progress,
        )
        end_fusion(ledger, actor=ACTOR, result=result.result)
    return result
