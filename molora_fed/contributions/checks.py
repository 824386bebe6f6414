"""The admission checks of one contribution alone that the core registers."""

import math
from dataclasses import replace

import torch

from molora_fed.adapters.compatibility import applied
from molora_fed.adapters.files import find_misfits, find_non_finite
from molora_fed.adapters.updates import Adapter
from molora_fed.contributions.admission import AdmissionCandidate, Stage, needs
from molora_fed.contributions.build import count_samples, find_loss_dtype
from molora_fed.contributions.carried import find_carried_misfits
from molora_fed.contributions.decision import list_quoted
from molora_fed.models.frozen import fingerprint_frozen
from molora_fed.storage.keys import verify
from molora_fed.storage.untrusted import clean
from molora_fed.types import Finding

__all__ = [
    "check_adapter_limits",
    "check_base_fingerprint",
    "check_carried_files",
    "check_charter_identity",
    "check_claimed_base",
    "check_finite_values",
    "check_frozen_depth",
    "check_own_domain_loss",
    "check_quantised_base",
    "check_required_samples",
    "check_shared_initialisation",
    "check_signature",
    "check_tensor_layout",
]


@needs(Stage.MANIFEST)
def check_signature(candidate: AdmissionCandidate) -> Finding | None:
    """Find a manifest that its contributor did not sign; refused as what `verify` raises."""
    contribution = candidate.contribution
    manifest = contribution.manifest
    what = f"contribution of '{manifest.contributor}'"
    verify(manifest.public_key, manifest.canonical, contribution.signature, what=what)
    return None


@needs(Stage.MANIFEST)
def check_required_samples(candidate: AdmissionCandidate) -> Finding | None:
    """Find a contribution without samples that are asked for, now or when it was received.

    Without them it could not be measured, and no fusion could take it. How many blocks it may have
    at most says the amendment that was in force when it was received.
    """
    charter = candidate.charter
    now = charter.amendment
    then = charter.model_copy(update={"amendment": candidate.received_under or now})
    sent = {
        split: entry.blocks for split, entry in candidate.contribution.manifest.sample_files.items()
    }
    asked = count_samples(then)
    wrong = [
        (f"1 to {count} {split} blocks", "none")
        for split, count in {**asked, **count_samples(charter)}.items()
        if split not in sent
    ]
    wrong += [
        (f"at most {asked.get(split, 0)} {split} blocks", str(blocks))
        for split, blocks in sent.items()
        if blocks > asked.get(split, 0)
    ]
    if not wrong:
        return None
    return Finding(
        ", ".join(want for want, _ in wrong),
        ", ".join(got for _, got in wrong),
        f"Sign it again under amendment {now.number}, with the samples that it asks for.",
    )


@needs(Stage.MANIFEST)
def check_carried_files(candidate: AdmissionCandidate) -> Finding | None:
    """Find a contribution without a file that was asked for when it was received, or with others.

    What is asked for since, an expert may lack: routers that read it decide what that means.
    """
    charter = candidate.charter
    then = charter.model_copy(update={"amendment": candidate.received_under or charter.amendment})
    wrong = find_carried_misfits(candidate.contribution.manifest, then)
    if not wrong:
        return None
    return Finding(
        ", ".join(want for want, _ in wrong),
        ", ".join(got for _, got in wrong),
        "Build the contribution again with the plugins that the charter's fusion.carried names.",
    )


@needs(Stage.MANIFEST)
def check_charter_identity(candidate: AdmissionCandidate) -> Finding | None:
    """Find a contribution signed for another cooperative, or under an amendment yet unknown."""
    manifest, charter = candidate.contribution.manifest, candidate.charter
    expected = f"charter {charter.identity_hash[:16]} up to amendment {charter.amendment.number}"
    if (
        manifest.charter_identity == charter.identity_hash
        and manifest.amendment <= charter.amendment.number
    ):
        return None
    return Finding(
        expected,
        f"charter {manifest.charter_identity[:16]}, amendment {manifest.amendment}",
        "Join this cooperative and sign its charter.",
    )


@needs(Stage.ADAPTER)
def check_base_fingerprint(candidate: AdmissionCandidate) -> Finding | None:
    """Find a specialist trained on another base or tokenizer."""
    manifest, identity = candidate.contribution.manifest, candidate.charter.identity.base
    pairs = [
        ("weights", identity.weights, manifest.base_weights),
        ("tokenizer", identity.tokenizer, manifest.base_tokenizer),
        # An adapter that does not say what it was trained on is judged by its loss.
        ("adapter trained on", identity.weights, candidate.adapter.base_weights),
    ]
    wrong = [(name, want, got) for name, want, got in pairs if got and got != want]
    if not wrong:
        return None
    return Finding(
        ", ".join(f"{name} {want[:16]}" for name, want, _ in wrong),
        ", ".join(f"{name} {got[:16]}" for name, _, got in wrong),
        f"Retrain on the cooperative's base '{identity.id}' or leave it out.",
    )


@needs(Stage.ADAPTER)
def check_adapter_limits(candidate: AdmissionCandidate) -> Finding | None:
    """Find an adapter of a kind, rank, size or frozen depth that the charter does not allow."""
    manifest, rules = candidate.contribution.manifest, candidate.charter.identity.adapters
    adapter = candidate.adapter
    largest = max(entry.bytes for entry in manifest.adapter_files.values())
    wrong = []
    if adapter.kind not in rules.kinds:
        wrong.append((f"kind {' or '.join(rules.kinds)}", f"kind {adapter.kind}"))
    if adapter.kind != manifest.kind:
        wrong.append((f"kind {manifest.kind} as the manifest states", f"kind {adapter.kind}"))
    if adapter.max_rank > rules.max_rank:
        wrong.append((f"rank at most {rules.max_rank}", f"rank {adapter.max_rank}"))
    if largest > rules.max_bytes:
        wrong.append((f"files of at most {rules.max_bytes} bytes", f"{largest} bytes"))
    if not wrong:
        return None
    return Finding(
        ", ".join(want for want, _ in wrong),
        ", ".join(got for _, got in wrong),
        "Export the adapter again within the charter's [identity.adapters].",
    )


@needs(Stage.ADAPTER)
def check_tensor_layout(candidate: AdmissionCandidate) -> Finding | None:
    """Find tensors whose name, shape, dtype or block does not fit the base and frozen depth."""
    rules = candidate.charter.identity.adapters
    # Kind and rank are another check's: its own values take their place in the rules.
    own = rules.model_copy(
        update={
            "kinds": (candidate.adapter.kind,),
            "max_rank": max(rules.max_rank, candidate.adapter.max_rank),
        }
    )
    offenders = find_misfits(candidate.adapter, candidate.base.model, rules=own)
    if not offenders:
        if candidate.effect.changed:
            return None
        return Finding(
            "a change of the base",
            f"one that changes 0 of {candidate.effect.modules} modules: every product is "
            "exactly zero",
            "Save the adapter after its training, from the model that was trained.",
        )
    return Finding(
        f"linear layers of the base in blocks >= {rules.frozen_depth}",
        list_quoted(offenders),
        "Train on the cooperative's base with its frozen depth and export again.",
    )


@needs(Stage.ADAPTER)
def check_finite_values(candidate: AdmissionCandidate) -> Finding | None:
    """Find NaN or infinity in any tensor."""
    offenders = find_non_finite(candidate.adapter)
    if not offenders:
        return None
    return Finding(
        "finite numbers in every tensor",
        f"NaN or infinity in {list_quoted(offenders)}",
        "Train again with a lower learning rate.",
    )


@needs(Stage.MODEL)
def check_own_domain_loss(candidate: AdmissionCandidate) -> Finding | None:
    """Find a specialist that does not improve on the base where it was trained.

    By its own statement it must be better than the base on the contributor's validation blocks;
    on the admission sample, measured here, it may be worse by the charter's threshold at most.
    Where no sample is sent, it is measured on the coordinator's own public text of the domain, if
    there is any; that is not the contributor's text, so a person decides on what is found.
    """
    manifest = candidate.contribution.manifest
    if not manifest.specialist_loss < manifest.base_loss:
        return Finding(
            f"a validation loss below the base's {manifest.base_loss:.4f} nats",
            f"{manifest.specialist_loss:.4f} nats",
            "Train longer or with another learning rate, or keep the base.",
        )
    if not candidate.has_text:
        return None  # its text is private: other members will tell
    rise = candidate.charter.amendment.admission.max_loss_rise
    losses = candidate.losses
    is_finite = math.isfinite(losses.specialist) and math.isfinite(losses.base)
    if not (is_finite and losses.specialist <= losses.base + rise):
        is_own = candidate.has_admission_blocks
        text = "the admission sample" if is_own else "the coordinator's public text"
        fix = f"Train on text like {text}, or lower the learning rate"
        return Finding(
            f"at most {losses.base + rise:.4f} nats on {text} of '{manifest.domain}' (base "
            f"{losses.base:.4f} + {rise:g})",
            f"{losses.specialist:.4f} nats",
            f"{fix}."
            if is_own
            else f"{fix}; the coordinator admits it all the same with `molora coop release`.",
            quarantine=not is_own,
        )
    return None


MIN_UNPROVEN_GAIN = 0.01
"""Nats per token that an adapter without its base's fingerprint must be better than the base."""
SHUFFLES = 8
"""Times that such an adapter's change is shuffled and measured."""
SHUFFLED_SHARE = 1 / 3
"""Largest share of its gain that a shuffled one may have; see docs/results/wrong_base.md."""


@needs(Stage.MODEL)
def check_claimed_base(candidate: AdmissionCandidate) -> Finding | None:
    """Find an adapter made elsewhere of which nothing but shapes tells that it is of this base.

    Its folder may name a base, which proves nothing, and another base of the same shapes takes it
    as well. So it has to show two things more than others. It is better than the base by a margin,
    as stated on the contributor's validation blocks and as measured on text of its domain. And
    it started from this base: with the rows and columns of every change shuffled, which keeps
    their sizes and nothing of the base's own coordinates, it gains much less.

    Source: own definition.
    """
    manifest, adapter = candidate.contribution.manifest, candidate.adapter
    origin = manifest.origin
    if origin is None or adapter.base_weights:
        return None
    wrong = []
    stated = manifest.base_loss - manifest.specialist_loss
    if not stated >= MIN_UNPROVEN_GAIN:  # written so that NaN is found
        wrong.append(f"{stated:.4f} nats by its own statement")
    if candidate.has_text:
        base, gain = candidate.losses.base, candidate.losses.base - candidate.losses.specialist
        if not gain >= MIN_UNPROVEN_GAIN:
            wrong.append(f"{gain:.4f} nats on text of its domain")
        shuffled = [
            base - candidate.measure(_shuffle(adapter, seed), candidate.text)
            for seed in range(SHUFFLES)
        ]
        best = max((each for each in shuffled if math.isfinite(each)), default=0.0)
        if not best <= SHUFFLED_SHARE * gain:
            wrong.append(f"{gain:.4f} nats, and {best:.4f} with its change shuffled")
    if not wrong:
        return None
    identity = candidate.charter.identity.base
    claimed = " ".join(each for each in (origin.base, origin.revision) if each)
    return Finding(
        f"proof that it was trained on '{identity.id}', as only its shapes fit: at least "
        f"{MIN_UNPROVEN_GAIN:g} nats below the base on its own text, and at most "
        f"{SHUFFLED_SHARE:.0%} of that with its change shuffled",
        f"a gain of {list_quoted(wrong)}; its folder names "
        + (f"'{claimed}'" if claimed else "no base")
        + (", in four bits" if origin.has_quantised_base else ""),
        f"Train on '{identity.id}' itself, or longer; the coordinator admits it all the same with "
        "`molora coop release`.",
        quarantine=True,
    )


def _shuffle(adapter: Adapter, seed: int) -> Adapter:
    """An adapter with the rows and columns of each change in another order."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, update in adapter.updates.items():
        rows, columns = (torch.randperm(size, generator=generator) for size in update.shape)
        updates[name] = replace(
            update,
            a=None if update.a is None else update.a[:, columns],
            b=None if update.b is None else update.b[rows],
            dense=None if update.dense is None else update.dense[rows][:, columns],
            bias=None if update.bias is None else update.bias[rows],
        )
    return replace(adapter, updates=updates)


@needs(Stage.MANIFEST)
def check_quantised_base(candidate: AdmissionCandidate) -> Finding | None:
    """Say that an adapter was trained on a copy of the base in four bits, by its folder's word.

    It is judged by its loss as any other: what rounding the base cost, the whole base gives back
    or takes away.
    """
    origin = candidate.contribution.manifest.origin
    if origin is None or not origin.has_quantised_base:
        return None
    return Finding(
        "an adapter trained on the whole base",
        f"one whose folder names '{clean(origin.base, 100)}', a base in four bits",
        "Look at its loss on the admission sample.",
        is_note=True,
    )


@needs(Stage.MODEL)
def check_frozen_depth(candidate: AdmissionCandidate) -> Finding | None:
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
    return Finding(
        f"embedding, head, norms and the first {depth} blocks bit-identical to the base",
        f"changes of {list_quoted(changed)}",
        f"Train with frozen depth {depth} and export again.",
    )


DTYPE_ALLOWANCE = 0.003
"""Nats per token that a loss in bfloat16 may be off the same loss in float32; the largest that was
measured is 0.0022, see docs/results/scale.md."""


@needs(Stage.MODEL)
def check_shared_initialisation(candidate: AdmissionCandidate) -> Finding | None:
    """Find a specialist that by its own measurement did not start from the cooperative's base.

    The contributor states the loss of the model its training started from on the blocks of its
    admission sample; the base is measured on the same blocks here. Stated in another dtype than
    the one it is measured in, it may be `DTYPE_ALLOWANCE` further off. A manifest without the
    statement, of an earlier version, passes: it is judged by fingerprint and loss.

    Source: arXiv 2603.22755 (unequal starting checkpoints route to the wrong expert); the
    comparison of losses is our own.
    """
    stated = candidate.contribution.manifest.start_loss
    if stated is None or not candidate.has_admission_blocks:
        return None
    gap = candidate.charter.amendment.admission.max_start_gap
    measured = candidate.base_loss
    own = str(candidate.base.model.dtype).removeprefix("torch.")
    theirs = find_loss_dtype(candidate.contribution.manifest.training)
    if theirs != own:
        gap += DTYPE_ALLOWANCE
    if abs(stated - measured) <= gap:  # Written so that NaN is found.
        return None
    return Finding(
        f"training that starts from the base, {measured:.4f} nats (within {gap:g}) on the "
        f"admission sample in {own}",
        f"a start stated with {stated:.4f} nats in {theirs}",
        f"Train again from the cooperative's base '{candidate.charter.identity.base.id}', loaded "
        "as it was published.",
        quarantine=True,
    )
