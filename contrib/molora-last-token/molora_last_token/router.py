"""Gates follow the evidence of the last token alone."""

from torch import Tensor

from molora_fed import OutputRouter, RouterOptions, RouterView


class LastTokenOptions(RouterOptions):
    """Options; `sharpness` is a factor on the evidence, per nat."""

    sharpness: float = 1.0


class LastTokenRouter(OutputRouter[LastTokenOptions]):
    """Gates softmax(sharpness * evidence_t): no memory, no training."""

    readings = frozenset({"evidence"})

    def scores(self, view: RouterView) -> Tensor:
        """Scaled evidence, (B, T, E)."""
        return self.options.sharpness * view.evidence
