"""The rule by which tuned.py chooses a method's setting, a learning rate and a restraint (KL coefficient or β).

benchmark/README.md, "The rule", says it in words. What is to be run next follows from the results alone, so a run
that was stopped goes on where it was. Needs the standard library only.
"""

import statistics
from dataclasses import dataclass
from typing import NamedTuple

FIRST_SEED, SECOND_SEED = 101, 102  # the whole grid; the finalists
FINALISTS = 4


class Setting(NamedTuple):
    learning_rate: float
    restraint: float | None


class Result(NamedTuple):
    """The end of a run. A policy that has diverged is infinitely far from the initial one."""

    gold: float
    kl: float


@dataclass
class Axis:
    """The values of a grid, and all values that it may grow to; both in increasing order."""

    scale: tuple
    values: tuple

    def __post_init__(self):
        first = self.scale.index(self.values[0])
        if self.scale[first : first + len(self.values)] != self.values:
            raise ValueError(f"{self.values} are not neighbours in {self.scale}")

    def grown(self, value) -> "Axis":
        """With one more value beside `value`, if that is an end of the grid and the scale goes on."""
        first = self.scale.index(self.values[0])
        last = self.scale.index(self.values[-1])
        if value == self.values[0] and first > 0:
            first -= 1
        if value == self.values[-1] and last < len(self.scale) - 1:
            last += 1
        return Axis(self.scale, self.scale[first : last + 1])


@dataclass
class Step:
    """What the rule needs to know before it can go on, or the setting that it has chosen."""

    missing: list[tuple[Setting, int]]  # with the seed
    chosen: Setting | None = None


def next_step(
    results: dict[tuple[Setting, int], Result],
    rates: Axis,
    restraints: Axis,
    most_kl: float,
) -> Step:
    """Follows the rule through the results, from the first grid on, as far as they go."""

    def gold(setting: Setting, seed: int) -> float:
        return results[setting, seed].gold

    def is_near(setting: Setting, seed: int) -> bool:
        """Whether it stayed within the limit; a run that is still missing may."""
        return (setting, seed) not in results or results[setting, seed].kl < most_kl

    while True:
        settings = [Setting(rate, restraint) for rate in rates.values for restraint in restraints.values]
        missing = [(setting, FIRST_SEED) for setting in settings if (setting, FIRST_SEED) not in results]
        if missing:
            return Step(missing)
        near = [setting for setting in settings if is_near(setting, FIRST_SEED) and is_near(setting, SECOND_SEED)]
        near.sort(key=lambda setting: -gold(setting, FIRST_SEED))
        finalists = near[:FINALISTS]
        missing = [(setting, SECOND_SEED) for setting in finalists if (setting, SECOND_SEED) not in results]
        if missing:
            return Step(missing)
        if finalists:
            best = max(finalists, key=lambda s: statistics.fmean([gold(s, FIRST_SEED), gold(s, SECOND_SEED)]))
            grown_rates = rates.grown(best.learning_rate)
            grown_restraints = restraints.grown(best.restraint)
        else:  # all went too far: slower, and held more firmly
            best = None
            grown_rates = rates.grown(rates.values[0])
            grown_restraints = restraints.grown(restraints.values[-1])
        if (grown_rates, grown_restraints) == (rates, restraints):
            return Step([], best)
        rates, restraints = grown_rates, grown_restraints
