"""The admission checks that hold a newcomer against those who are in, text and adapters."""

import math

from molora_fed.adapters.similarity import compute_similarity
from molora_fed.contributions.admission import AdmissionCandidate, Stage, needs
from molora_fed.contributions.decision import list_quoted
from molora_fed.contributions.manifest import Contribution
from molora_fed.corpus.blocks import Blocks
from molora_fed.errors import AdapterError, CorpusError
from molora_fed.types import Finding, Split

__all__ = ["MAX_FOREIGN_RISE", "MAX_SIMILARITY", "check_near_copy", "check_other_domains"]

MAX_FOREIGN_RISE = 20.0
"""Nats per token that a newcomer may be above the base on somebody else's sample. Forgetting costs
a few; what is beyond comes near the numbers that sums of a fusion cannot hold."""
MAX_SIMILARITY = 0.85
"""From here on two adapters count as one. Copies of 8, 4 and 2 bits came to 0.88 and more, two
honest trainings of one domain to 0.79 at most; see docs/protocol.md."""
MAX_FOREIGN_BLOCKS = 128
"""Blocks of all others together that a newcomer is measured on."""
_SPLITS = (Split.ADMISSION, Split.CALIBRATION, Split.HELD_OUT)


@needs(Stage.MODEL)
def check_other_domains(candidate: AdmissionCandidate) -> Finding | None:
    """Find a specialist whose numbers break on the text of others, which a fusion runs it over.

    It may be bad there, as a specialist is, but its losses are finite and not far above the base's.
    What lies on none of the samples, the bank finds, and leaves the contribution out.
    """
    wrong = []
    share = max(1, MAX_FOREIGN_BLOCKS // max(1, len(candidate.others)))
    for other in candidate.others[:MAX_FOREIGN_BLOCKS]:
        blocks = _load_sample(other)
        if blocks is None:
            continue
        sample = blocks.take(share)
        limit = candidate.measure(None, sample) + MAX_FOREIGN_RISE
        loss = candidate.measure(candidate.adapter, sample)
        if not (math.isfinite(loss) and loss <= limit):
            name = f"'{other.manifest.contributor}' ({other.manifest.domain})"
            wrong.append(f"{loss:.4g} nats on the sample of {name}, not {limit:.4f}")
    if not wrong:
        return None
    return Finding(
        f"finite losses of at most {MAX_FOREIGN_RISE:g} nats above the base on every admitted "
        "contributor's sample",
        list_quoted(wrong),
        "Train with a lower learning rate, from the cooperative's base.",
    )


def _load_sample(other: Contribution) -> Blocks | None:
    """What another contributor sent to be measured on; None where texts are private."""
    sent = {str(split) for split in other.manifest.sample_files}
    try:
        return next((other.load_samples(split) for split in _SPLITS if split in sent), None)
    except (AdapterError, CorpusError):  # the newcomer is not to blame for it
        return None


@needs(Stage.MODEL)
def check_near_copy(candidate: AdmissionCandidate) -> Finding | None:
    """Find an adapter that is another admitted one, rescaled or written otherwise.

    Compared are products, so that kind, precision, scale and factors make no difference.

    Source: own definition, see `molora_fed.adapters.similarity`.
    """
    alike = []
    for other in candidate.others:
        adapter = candidate.read_adapter(other)
        if adapter is None:
            continue
        similarity = compute_similarity(candidate.adapter, adapter)
        if similarity >= MAX_SIMILARITY:
            found = f"{similarity:.3f} to contribution {other.id[:16]} of"
            alike.append(f"{found} '{other.manifest.contributor}'")
    if not alike:
        return None
    return Finding(
        f"a similarity below {MAX_SIMILARITY:g} to every admitted adapter",
        list_quoted(alike),
        "Train your own; where two are alike by chance, the coordinator admits it with "
        "`molora coop release`.",
        quarantine=True,
    )
