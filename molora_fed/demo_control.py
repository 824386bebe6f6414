"""The demo's control: the base continued on everyone's pooled text, which only a demo can see."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from molora_fed.control import train_monolithic
from molora_fed.cooperative import Cooperative
from molora_fed.federation.local import LocalContributor
from molora_fed.plugins import Plugins
from molora_fed.specialists import Specialist
from molora_fed.standalone import Terms, prepare_domain
from molora_fed.types import Progress, Split

if TYPE_CHECKING:
    from molora_fed.base import Base

__all__ = ["train_control"]


def train_control(
    cooperative: Cooperative,
    base: "Base",
    contributors: Sequence[LocalContributor],
    *,
    threads: int,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Specialist:
    """Train the control before anyone contributes, where the coordinator looks for it.

    It takes the steps that all specialists may take together. Those who stop early take fewer, so
    the comparison never favours the fused model.

    Args:
        cooperative: The cooperative; gets `control/`.
        base: Its base.
        contributors: Whose text is pooled.
        threads: Torch threads.
        plugins: Where domains and kinds are registered; the installed plugins by default.
        progress: Told the step with loss, validation_loss, tokens_per_second and eta_seconds.

    Raises:
        MoloraError: Whatever corpus or training refuse.
    """
    folder = cooperative.folder / "control"
    charter = cooperative.charter
    terms = Terms(charter, base)
    corpora = [
        prepare_domain(
            terms,
            member.domain,
            member.data,
            folder / "text" / member.name,
            shard=member.shard,
            plugins=plugins,
        )
        for member in contributors
    ]
    training = charter.amendment.training
    return train_monolithic(
        base,
        [corpus.blocks[Split.TRAIN] for corpus in corpora],
        [corpus.blocks[Split.VALIDATION] for corpus in corpora],
        steps=training.steps * len(contributors),
        rules=charter.identity.adapters,
        training=training,
        seed=charter.amendment.seed,
        threads=threads,
        folder=folder,
        plugins=plugins,
        evaluation_batch=charter.identity.corpus.evaluation_batch,
        progress=progress,
    )
