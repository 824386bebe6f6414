"""The admission check: what a contribution must be to be fused."""

from molora_fed import (
    AdmissionCandidate,
    Configurable,
    Finding,
    PluginOptions,
    Stage,
    needs,
)


class SampleOptions(PluginOptions):
    """Options, set where the charter names the check.

    Attributes:
        limit: Largest Frobenius norm that an update of a layer may have.
    """

    limit: float = 1000.0


@needs(Stage.ADAPTER)
class SampleCheck(Configurable[SampleOptions]):
    """No update of a layer is larger than a limit."""

    def __call__(self, candidate: AdmissionCandidate) -> Finding | None:
        """Check a contribution: the one method to fill in.

        A check that raises quarantines the contribution. With `Stage.ADAPTER` it runs once the
        files could be read; `Stage.MANIFEST` reads the manifest alone, `Stage.MODEL` runs the
        adapter.

        Args:
            candidate: `contribution.manifest` has who made it, its domain and how it was trained;
                `adapter` the updates by layer, `charter` the rules, `base` the base.

        Returns:
            What was expected, what was found, and one thing the contributor can do; None if
            nothing is wrong. With `quarantine=True` a person decides.

        See docs/hooks/admission-checks.md.
        """
        for name, update in candidate.adapter.updates.items():
            norm = float(update.product().norm())
            if not norm <= self.options.limit:  # NaN is no norm either
                return Finding(
                    f"updates of Frobenius norm at most {self.options.limit:g}",
                    f"{norm:g} at {name}",
                    "Train with a lower learning rate.",
                )
        return None
