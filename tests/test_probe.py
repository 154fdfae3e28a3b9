"""The fastest setting is found by a simulated clock, and what was set before is left alone."""

from functools import partial

import pytest
import torch
from conftest import tiny

from mtp.decode.contract import Request
from mtp.decode.drafters import OwnHeads
from mtp.decode.loop import Decoding, generate
from mtp.decode.probe import Setting, fastest

REQUESTS = [Request([1, 2, 3]), Request([4])]
BOTH = [1, 3]


@pytest.fixture(autouse=True)
def two_threads(one_thread):
    """Other than the candidates, so that a probe that leaves its own behind is seen."""
    torch.set_num_threads(2)


class Machine:
    """Takes steps as long as its tables say, and keeps the settings that took turns."""

    def __init__(self, seconds, prompt=0.0, disturbed=lambda turn: 0.0):
        self.seconds, self.prompt, self.disturbed = seconds, prompt, disturbed
        self.now, self.turns = 0.0, []

    def probe(self, threads=BOTH):
        names = dict.fromkeys(setting.precision for setting in self.seconds)
        decoders = {name: lambda requests, name=name: Steps(self, name) for name in names}
        return fastest(decoders, REQUESTS, threads, clock=lambda: self.now)


class Steps:
    """Stands for a Decoding that never ends."""

    def __init__(self, machine, precision):
        self.machine, self.setting = machine, Setting(torch.get_num_threads(), precision)
        machine.turns.append(self.setting)
        machine.now += machine.prompt * self.setting.threads

    def fill(self):
        return True

    def step(self):
        machine = self.machine
        machine.now += machine.seconds[self.setting] + machine.disturbed(len(machine.turns))


def settings(one, all_of_them, one_bf16=None, all_bf16=None):
    seconds = {Setting(1, "float32"): one, Setting(3, "float32"): all_of_them}
    if one_bf16 is not None:
        seconds |= {Setting(1, "bfloat16"): one_bf16, Setting(3, "bfloat16"): all_bf16}
    return seconds


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        (settings(0.1, 0.2), (1, "float32")),
        (settings(0.2, 0.1), (3, "float32")),
        (settings(0.1, 3.0), (1, "float32")),
        (settings(0.2, 0.1, 0.08, 0.05), (3, "bfloat16")),
        (settings(0.2, 0.1, 0.05, 0.08), (1, "bfloat16")),
        (settings(0.2, 0.1, 2.0, 1.0), (3, "float32")),
        (settings(0.1, 0.099, 0.098, 0.097), (1, "float32")),  # a text must not hang on noise
    ],
    ids=str,
)
def test_what_is_clearly_fastest_is_chosen(seconds, chosen):
    probe = Machine(seconds).probe()
    assert probe.chosen == chosen
    assert probe.seconds == pytest.approx(seconds)


def test_prompts_do_not_count():
    assert Machine(settings(0.2, 0.1), prompt=5.0).probe().chosen.threads == 3


def test_a_disturbance_that_passes_does_not_count():
    for spared in range(2):  # a round of two turns, counted from 1
        machine = Machine(
            settings(0.2, 0.1), disturbed=lambda turn, s=spared: 9.0 * ((turn - 1) // 2 != s)
        )
        assert machine.probe().chosen.threads == 3


def test_settings_take_turns_and_slow_ones_only_few():
    slow, quick = Machine(settings(1.0, 2.0)), Machine(settings(0.01, 0.02))
    slow.probe(), quick.probe()
    assert slow.turns == 2 * list(slow.seconds)
    assert quick.turns == len(quick.turns) // 2 * list(quick.seconds) != slow.turns


def test_without_a_choice_nothing_is_measured():
    machine = Machine({Setting(3, "float32"): 1.0})
    probe = machine.probe([3])
    assert (probe.chosen, probe.seconds, machine.turns) == ((3, "float32"), {}, [])
    assert str(probe) == "3 threads in float32"


def test_it_is_said_in_one_line():
    said = str(Machine(settings(0.002, 0.001)).probe())
    assert said == (
        "3 threads in float32 (ms per step: 1 thread in float32 2.00, 3 threads in float32 1.00)"
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_number_of_threads_is_left_as_it_was(error):
    def disturbed(turn):
        if error and turn == 3:
            raise error
        return 0.0

    machine = Machine(settings(0.2, 0.1), disturbed=disturbed)
    if error:
        with pytest.raises(error):
            machine.probe()
    else:
        machine.probe()
    assert torch.get_num_threads() == 2


def test_a_probe_leaves_no_trace_in_the_text():
    """Nor does it ask for more than the requests: one of them fills the whole context."""
    model, drafter = tiny(max_seq_len=40), OwnHeads()
    most = model.config.max_seq_len
    requests = [
        Request([i % 13 for i in range(most - 9)], 9),
        Request([3], most - 1, stop=lambda new: len(new) == 20),
        Request([5], 1),
    ]
    wanted = generate(model, requests)
    probe = fastest({"float64": partial(Decoding, model, drafter=drafter)}, requests, BOTH)
    assert all(took > 0 for took in probe.seconds.values())
    found = generate(model, requests, drafter)
    assert [x.tokens for x in found] == [x.tokens for x in wanted]


def test_texts_too_short_for_a_step_do_not_matter():
    decoders = {"float64": partial(Decoding, tiny())}
    assert fastest(decoders, [Request([5], 1)], BOTH).chosen.threads == 1
    assert fastest(decoders, [], BOTH).chosen.threads == 1
