"""Admission checks of the protocol's two rules: frozen depth, and one shared initialisation."""

from molora_fed.adapters.apply import applied
from molora_fed.adapters.frozen import fingerprint_frozen
from molora_fed.contributions.admission import Candidate, Stage, needs
from molora_fed.types import Finding

__all__ = ["check_frozen_depth", "check_shared_initialisation"]

_SHOWN = 5


@needs(Stage.MODEL)
def check_frozen_depth(candidate: Candidate) -> Finding | None:
    """Find a specialist whose frozen tensors are not, bit by bit, the base's.

    Whatever its files say, it is applied and the tensors are compared: embedding, head, norms and
    the charter's first K blocks.

    Source: arXiv 2603.22755, protocol step 2 (the first K layers and the embedding stay frozen).
    """
    depth = candidate.charter.identity.adapters.frozen_depth
    before = fingerprint_frozen(candidate.base.model, depth)
    with applied(candidate.base.model, candidate.adapter) as model:
        after = fingerprint_frozen(model, depth)
    changed = sorted(name for name, fingerprint in before.items() if after[name] != fingerprint)
    if not changed:
        return None
    more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return Finding(
        f"embedding, head, norms and the first {depth} blocks bit-identical to the base",
        f"changes of {'; '.join(changed[:_SHOWN])}{more}",
        f"Train with frozen depth {depth} and export again.",
    )


@needs(Stage.MODEL)
def check_shared_initialisation(candidate: Candidate) -> Finding | None:
    """Find a specialist that by its own measurement did not start from the cooperative's base.

    The contributor states the loss of the model its training started from on the blocks of its
    admission sample; the base is measured on the same blocks here. A manifest without the
    statement, of an earlier version, passes: it is judged by fingerprint and loss.

    Source: arXiv 2603.22755 (unequal starting checkpoints route to the wrong expert); the
    comparison of losses is our own.
    """
    stated = candidate.contribution.manifest.start_loss
    if stated is None or not candidate.has_admission_blocks:
        return None
    gap = candidate.charter.amendment.admission.max_start_gap
    measured = candidate.base_loss
    if abs(stated - measured) <= gap:  # Written so that NaN is found.
        return None
    return Finding(
        f"training that starts from the base, {measured:.4f} nats (within {gap:g}) on the "
        "admission sample",
        f"a start stated with {stated:.4f} nats",
        f"Train again from the cooperative's base '{candidate.charter.identity.base.id}', loaded "
        "as it was published.",
        quarantine=True,
    )
