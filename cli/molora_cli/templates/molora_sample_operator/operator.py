"""The operator: what happens to a population between two generations."""

from dataclasses import replace

from molora_fed import LifecycleOperator, LifecycleState, OperatorOptions


class SampleOptions(OperatorOptions):
    """Options, set where the charter names the operator.

    Attributes:
        threshold: Fitness below which a slot loses its place, nats per token.
    """

    threshold: float = 0.0


class SampleOperator(LifecycleOperator):
    """Frees the least fit slot if it is worth less than the threshold; one always stays."""

    Options = SampleOptions

    def apply(self, state: LifecycleState, seed: int) -> LifecycleState:
        """Make the next state: the one method to fill in.

        The same state and seed give the same state, to the bit; no slot is lost, and no tensor
        of the given state is changed in place.

        Args:
            state: P slots in `population.slots`; `fitness.values`, (P,) nats per token, what the
                population loses without each; `freed`, slots that nobody has filled yet. Who
                fills a freed slot takes it out of `freed`, gives the newborn the id
                "g{generation}-s{slot}", and says in `parents` whose gates it gets.
            seed: Of whatever is drawn; this operator draws nothing.

        Returns:
            The next state; `events` has one line for people a thing that happened.

        See docs/hooks/lifecycle-operators.md, and docs/populations.md.
        """
        living = [i for i in range(state.population.num_slots) if i not in state.freed]
        if len(living) < 2:
            return state
        values = state.fitness.values
        worst = min(living, key=lambda slot: (values[slot], slot))
        if values[worst] >= self.options.threshold:
            return state
        event = f"slot {worst} is freed: fitness {values[worst]:+.4f} nats"
        freed = tuple(sorted({*state.freed, worst}))
        return replace(state, freed=freed, events=(*state.events, event))
