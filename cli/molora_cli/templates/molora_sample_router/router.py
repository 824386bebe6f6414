"""The router: what it reads of a text, and which expert it prefers."""

from typing import Any

from molora_fed import OutputRouter, RouterOptions, RouterView
from torch import Tensor


class SampleOptions(RouterOptions):
    """Options, set where the charter names the router.

    Attributes:
        sharpness: Factor on the evidence, per nat; a larger one follows one expert sooner.
    """

    sharpness: float = 1.0


class SampleRouter(OutputRouter[SampleOptions]):
    """Gates softmax(sharpness * evidence_t): no memory, no training."""

    readings = frozenset({"evidence"})

    def scores(self, view: RouterView) -> Tensor:
        """Score every expert at every position: the one method to fill in.

        Gates are the softmax of the scores over the experts. Position t may depend on tokens up
        to x_t only; its gates weigh the predictions of x_{t+1}.

        Args:
            view: B texts of T tokens, read by E experts. Of its columns those that `readings`
                names are there: `evidence` is log p_e(x_t | x_<t) in nats, (B, T, E), and 0 at
                the first token of a document.

        Returns:
            Scores, (B, T, E), unitless.

        See docs/hooks/routers.md, which has what else a router may override, such as `learn`.
        """
        evidence: Any = view.evidence
        return self.options.sharpness * evidence
