"""An admission check by the numbers of an adapter alone: nothing of it is run."""

from statistics import median

from pydantic import Field

from molora_fed import AdmissionCandidate, Configurable, Finding, PluginOptions, Stage, needs
from molora_outlier.shape import Shape, measure_shape

__all__ = ["OutlierCheck", "OutlierOptions"]


class OutlierOptions(PluginOptions):
    """Limits; what honest specialists measured is in the README.

    Attributes:
        max_norm: Largest norm of a module's difference, as a multiple of its weight's.
        max_share: Largest part of it that the first singular direction holds, median over modules;
            adapters of rank 3 or less are not asked.
        max_spread: Largest of the relative norms, as a multiple of their median.
        max_ratio: Largest norm, as a multiple of the median of admitted adapters of its kind.
        min_peers: Fewest admitted adapters of its kind to compare it with.
    """

    max_norm: float = Field(default=2.0, gt=0)
    max_share: float = Field(default=0.9, gt=0, le=1)
    max_spread: float = Field(default=20.0, ge=1)
    max_ratio: float = Field(default=8.0, ge=1)
    min_peers: int = Field(default=3, ge=1)


_LOW_RANK = 3  # up to here one direction may well hold all there is
_FIX = "Train with a lower learning rate or more steps, or ask the coordinator to look at it."


@needs(Stage.ADAPTER)
class OutlierCheck(Configurable[OutlierOptions]):
    """Quarantines an adapter whose size or spectrum no honest training has shown."""

    def __call__(self, candidate: AdmissionCandidate) -> Finding | None:
        """What is unusual about it, for a person to look at.

        Args:
            candidate: The contribution.
        """
        shape = measure_shape(candidate.adapter, candidate.base)
        if shape is None:
            return None
        found = self._compare_with_limits(shape, candidate.adapter.max_rank)
        found += self._compare_with_peers(shape, candidate)
        if not found:
            return None
        expected, got = zip(*found, strict=True)
        return Finding("; ".join(expected), "; ".join(got), _FIX, quarantine=True)

    def _compare_with_limits(self, shape: Shape, rank: int) -> list[tuple[str, str]]:
        """What it should be and is, of each limit that it breaks."""
        options, broken = self.options, []
        if shape.norm > options.max_norm:
            broken.append(
                (
                    f"differences of at most {options.max_norm:g} times a weight's norm",
                    f"{shape.norm:.3g} in {shape.norm_module}",
                )
            )
        if shape.share > options.max_share and not 0 < rank <= _LOW_RANK:
            broken.append(
                (
                    f"at most {options.max_share:.0%} of them in one direction",
                    f"{shape.share:.1%} in half of the modules",
                )
            )
        if shape.spread > options.max_spread:
            broken.append(
                (
                    f"a largest module of at most {options.max_spread:g} times the median",
                    f"{shape.spread:.3g} times in {shape.norm_module}",
                )
            )
        return broken

    def _compare_with_peers(
        self, shape: Shape, candidate: AdmissionCandidate
    ) -> list[tuple[str, str]]:
        """The same against those who are in with an adapter of the same kind."""
        kind = candidate.contribution.manifest.kind
        peers = [other for other in candidate.others if other.manifest.kind == kind]
        if len(peers) < self.options.min_peers:
            return []
        adapters = filter(None, map(candidate.read_adapter, peers))
        shapes = [measure_shape(adapter, candidate.base) for adapter in adapters]
        norms = [peer.norm for peer in shapes if peer is not None]
        if len(norms) < self.options.min_peers:
            return []
        limit = self.options.max_ratio * median(norms)
        if shape.norm <= limit:
            return []
        expected = (
            f"at most {self.options.max_ratio:g} times the median of {len(norms)} admitted "
            f"adapters, {limit:.3g}"
        )
        return [(expected, f"{shape.norm:.3g}")]
