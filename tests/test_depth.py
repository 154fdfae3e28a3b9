"""Adaptive depth against the best fixed depth, by a simulated clock.

Regret is in seconds of the undisturbed machine and in expected tokens; what the policy is told is
noisy: seconds by a tenth, one step in a hundred five times as long, acceptance by chance.
"""

import random
from itertools import accumulate
from operator import mul

import pytest

from mtp.decode.depth import AdaptiveDepth

COSTS = {  # seconds of a step with k guesses
    "rows nearly free": lambda k: 1.0 + 0.02 * k,
    "rows cost some": lambda k: 1.3 + 0.2 * k if k else 1.0,
    "rows cost much": lambda k: 1.0 + 0.8 * k,
}
GOOD, HOPELESS = [0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6], [0.02] * 7
TEXTS = {  # probability that a guess stands where those before it stand
    "good": GOOD,
    "even": [0.8] * 7,
    "middling": [0.6, 0.4] + [0.3] * 5,
    "hopeless": HOPELESS,
}
SIZES = [(3, 1), (3, 8), (7, 1)]  # most guesses, rows of the batch


def tokens(text, k):
    """Expected of a step with k guesses, per row."""
    return 1 + sum(accumulate(text[:k], mul))


class Machine:
    """Takes steps as a policy wants them, and keeps their number by depth, their seconds, and those
    that the best fixed depth would have taken.
    """

    def __init__(self, cost, most, rows=1, missed=0.0, seed=0):
        self.cost, self.most, self.rows, self.missed = cost, most, rows, missed
        self.random, self.policy = random.Random(seed), AdaptiveDepth()
        self.skipped, self.chosen = 0, []
        self.seconds = self.best = 0.0

    def step(self, text, most, slowness=1.0):
        """-> tokens; missed: seconds by which each skipped step makes the next guesses dearer."""
        k = self.policy.choose(most)
        accepted = [self._accepted(text[:k]) for _ in range(self.rows)]
        seconds = slowness * (self.cost(k) + self.missed * self.skipped * (k > 0))
        self.skipped = 0 if k else self.skipped + 1
        noise = max(0.3, self.random.gauss(1, 0.1)) * (5 if self.random.random() < 0.01 else 1)
        self.policy.observe(k, accepted, seconds * noise)
        rate = max(tokens(text, j) / self.cost(j) for j in range(most + 1))
        self.chosen.append(k)
        self.seconds += seconds
        self.best += slowness * tokens(text, k) / rate
        return tokens(text, k)

    def _accepted(self, text):
        stands = (self.random.random() < a for a in text)
        return next((i for i, stood in enumerate(stands) if not stood), len(text))

    def read(self, text, count, slowness=1.0):
        """-> the depths of the steps that yield so many tokens per row."""
        before, done = len(self.chosen), 0.0
        while done < count:
            done += self.step(text, self.most, slowness)
        return self.chosen[before:]

    @property
    def regret(self):
        return 1 - self.best / self.seconds


@pytest.mark.parametrize(("most", "rows"), SIZES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cost", COSTS)
def test_it_is_nearly_as_fast_as_the_best_fixed_depth(cost, text, most, rows):
    machine = Machine(COSTS[cost], most, rows)
    for _ in range(3000):
        machine.step(TEXTS[text], most)
    assert machine.regret <= 0.05


@pytest.mark.parametrize(("most", "rows"), SIZES)
@pytest.mark.parametrize("cost", COSTS)
def test_it_follows_a_text_that_becomes_another_one(cost, most, rows):
    machine = Machine(COSTS[cost], most, rows)
    for text in (GOOD, HOPELESS, GOOD):
        machine.read(text, 3000)
    assert machine.regret <= 0.05


@pytest.mark.parametrize("slow", [GOOD, HOPELESS])
@pytest.mark.parametrize("cost", COSTS)
def test_it_follows_a_machine_that_is_slower_for_a_while(cost, slow):
    machine = Machine(COSTS[cost], 3)
    for text, slowness in ((GOOD, 1), (slow, 2), (GOOD, 1)):
        machine.read(text, 3000, slowness)
    assert machine.regret <= 0.05


@pytest.mark.parametrize("missed", [0.0, 0.02])
@pytest.mark.parametrize(("most", "rows"), [(1, 1), *SIZES])
@pytest.mark.parametrize("cost", ["rows cost some", "rows cost much"])
def test_hopeless_guesses_are_not_made(cost, most, rows, missed):
    """Where rows are nearly free a hopeless guess pays for itself, and any depth is right."""
    chosen = Machine(COSTS[cost], most, rows, missed).read(HOPELESS, 3000)
    assert chosen.count(0) >= 0.9 * len(chosen)
    assert any(chosen[len(chosen) // 2 :])  # but still tried


@pytest.mark.parametrize("most", [1, 3])
def test_what_a_drafter_missed_is_not_taken_for_the_cost_of_its_guesses(most):
    """Here the first guesses after fifty skipped steps take more than twice as long as others."""
    machine = Machine(COSTS["rows cost some"], most, missed=0.05)
    machine.read(HOPELESS, 10_000)
    after = machine.read(GOOD, 4000)[400:]
    assert after.count(0) < 0.2 * len(after)  # it is tried now and then, as others are


def test_what_a_drafter_missed_is_part_of_the_time_for_trying():
    """The dearer it is, the rarer it is asked."""
    cheap, dear = (
        Machine(COSTS["rows cost some"], 1, missed=x).read([0.0], 3000) for x in (0.0, 0.05)
    )
    assert 0 < 3000 - dear.count(0) < (len(cheap) - cheap.count(0)) / 2


def test_every_depth_is_tried_at_the_start():
    machine = Machine(COSTS["rows cost some"], 7)
    machine.read(GOOD, 60)
    assert set(machine.chosen) == set(range(8))


def test_steps_near_the_end_of_texts_spoil_nothing():
    machine = Machine(COSTS["rows cost some"], 7)
    for room in [7] * 12 + [4, 2, 1, 0] * 250:
        before = len(machine.chosen)
        machine.step(GOOD, room)
        assert machine.chosen[before] <= room
    after = Machine(COSTS["rows cost some"], 7)
    after.policy = machine.policy
    after.read(GOOD, 4000)
    assert after.regret <= 0.05


@pytest.mark.parametrize(("rows_that_stand", "pays"), [(1, False), (7, True)])
def test_the_rows_of_a_batch_are_averaged(rows_that_stand, pays):
    cost, policy, chosen = COSTS["rows cost some"], AdaptiveDepth(), []
    for _ in range(300):
        chosen.append(k := policy.choose(3))
        policy.observe(k, [k] * rows_that_stand + [0] * (8 - rows_that_stand), cost(k))
    assert chosen[-100:].count(3 if pays else 0) > 80


def test_equal_steps_give_equal_choices_whatever_the_unit_of_time():
    seconds, short = (Machine(COSTS["rows cost some"], 3) for _ in range(2))
    assert seconds.read(GOOD, 3000) == short.read(GOOD, 3000, slowness=2**-10)


def test_without_a_drafter_there_is_no_choice():
    policy = AdaptiveDepth()
    for _ in range(10):
        assert policy.choose(0) == 0
        policy.observe(0, [0, 0], 1.0)
