"""The benchmark itself: that it measures what it says, and says what it could not measure."""

import pytest
import torch

import funcopt

from ..cases import assert_close, clone
from . import __main__ as command
from . import load, peers, steps, training, unroll, unroll_long
from .measure import Absent, Candidate, Settings, compare, in_turn
from .memory import used_by
from .processes import OutOfTime, ask
from .report import markdown
from .results import Figure, Row, Section, at_most, below
from .training import BY_AUTOGRAD, BY_GRAD, IN_PLACE
from .workloads import SHAPES, elements

MIB = 2**20
CPU = torch.device("cpu")


class Machine:
    """A clock, and steps that take a known time by it."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def candidate(self, name, cost):
        def step():
            self.log.append(name)
            # Half of the time something else runs, too, and everything takes seven times as long.
            self.now += cost * (7 if self.now % 60 < 30 else 1)

        return Candidate(name, lambda: step, required=True)


def test_ratios_are_right_though_the_machine_is_sometimes_slower():
    machine = Machine()
    costs = {"baseline": 0.01, "half": 0.005, "tiny": 1e-5, "slow": 0.4}
    everyone = [machine.candidate(name, cost) for name, cost in costs.items()]
    measured = compare(everyone, Settings(CPU, rounds=40, seconds=1e9), machine)
    for name, cost in costs.items():
        assert measured.ratio(name, "baseline").value == pytest.approx(cost / 0.01)
    assert measured.ratio("slow", "baseline", "half", factor=3).value == pytest.approx(80)
    assert all(len(seconds) == 40 for seconds in measured.seconds.values())


def test_every_round_takes_everyone_in_an_order_of_its_own():
    machine = Machine()
    compare([machine.candidate(n, 1.0) for n in "abcd"], Settings(CPU, 10, 1e9), machine)
    # Each sample is a step to warm up and one that is timed.
    log = machine.log[-2 * 4 * 10 :]
    assert log[::2] == log[1::2]
    orders = [tuple(log[start : start + 8 : 2]) for start in range(0, len(log), 8)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 5


def test_a_busy_machine_is_reported(monkeypatch):
    # In one second of two processors' time, 1.5 were worked, 1.1 of them for this process.
    times = iter([(10.0, 5.0, 1.0), (12.0, 6.5, 2.1)])
    monkeypatch.setattr(load, "_seconds", lambda: next(times))
    machine = Machine()
    measured = compare([machine.candidate("a", 1.0)], Settings(CPU, 5, 1.0), machine)
    assert measured.load == pytest.approx(0.2)
    assert "took 20% of the machine" in measured.caution()
    assert not measured._replace(load=0.01).caution()


def test_it_stops_when_the_time_is_up():
    machine = Machine()
    measured = compare([machine.candidate("a", 1.0)], Settings(CPU, 1000, 50.0), machine)
    assert 5 <= len(measured.seconds["a"]) <= 51


def test_what_cannot_be_measured_says_why_and_what_is_ours_must_not_fail():
    def build(error):
        raise error

    machine = Machine()
    everyone = [
        machine.candidate("a", 1.0),
        Candidate("absent", lambda: build(Absent("not installed"))),
        Candidate("broken", lambda: build(RuntimeError("no such kernel\nand a long story"))),
    ]
    measured = compare(everyone, Settings(CPU, 2, 1.0), machine)
    assert measured.row("absent", "a").note == "not installed"
    assert measured.row("broken", "a").note == "fails: RuntimeError: no such kernel"
    assert measured.row("a", "absent", target=at_most(1)).verdict == "not judged"
    with pytest.raises(RuntimeError, match="no such kernel"):
        compare([everyone[2]._replace(required=True)], Settings(CPU, 2, 1.0), machine)


def test_a_target_is_judged_by_the_figure_that_is_shown():
    assert at_most(1.0).holds(Figure(1.0049))
    assert not at_most(1.0).holds(Figure(1.006))
    assert not below(1.0).holds(Figure(0.9951))
    assert not at_most(60).holds(Figure(float("inf")))


def test_the_report_names_the_targets_that_do_not_hold():
    rows = [
        Row("quick", Figure(0.5, 0.4, 0.6), at_most(1.0)),
        Row("slow", Figure(1.5, 1.4, 1.6), at_most(1.0)),
        Row("away", None, at_most(1.0), "not installed"),
    ]
    text = markdown("- heading", [Section("work", "4 leaves", "", "time / baseline", rows)])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| quick | 0.50 | 0.40 to 0.60 | ≤ 1.00 | yes | |" in lines
    assert "| slow | 1.50 | 1.40 to 1.60 | ≤ 1.00 | no | |" in lines
    assert "| away | | | ≤ 1.00 | not judged | not installed |" in lines
    assert "1 of 2 targets hold." in lines
    assert text.index("Not held:") < text.index("- work: slow") < text.index("Not judged:")


def test_the_command_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    def no_compiler(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(peers, "installed", lambda library: False)
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setitem(steps._BOUNDS, "mlp-tiny", (0.1, 1000.0))
    arguments = ["--only", "mlp-tiny", "--rounds", "2", "--output", str(tmp_path / "new")]
    assert command.main(arguments) == 0
    text = (tmp_path / "new" / "results.md").read_text()
    assert text in capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines() if line.startswith("|")]
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "not installed" in rows["TorchOpt"]
    assert "not installed" in rows["optax jit, donated"]
    assert "fails: RuntimeError: no compiler" in rows["torch compiled"]
    assert "| ≤ 0.10 | no |" in rows["funcopt update_"]
    assert "| ≤ 1000 | yes |" in rows["funcopt update"]
    assert "TorchOpt not installed" in text  # among the versions
    assert (tmp_path / "new" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert command.main([*arguments, "--check"]) == 1


def test_a_device_that_is_not_there_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_the_peak_of_a_step_is_what_it_allocates():
    def step():
        torch.ones(8, 2**20)  # 32 MiB

    assert 30 * MIB < max(use.peak for use in used(step)) < 40 * MIB


def test_the_peak_counts_what_is_kept_and_nothing_of_it_is_left():
    opt = funcopt.SGD(lr=0.1)
    params = {"w": torch.ones(8, 2**20)}
    # The gradient and the parameters before the steps are there before.
    found = used(in_turn(opt.update, params, opt.init(params), params))
    assert 30 * MIB < max(use.peak for use in found) < 40 * MIB
    assert max(use.left for use in found) < 4 * MIB


def used(step):
    try:
        return used_by(step)
    except Absent as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", [BY_GRAD, BY_AUTOGRAD, IN_PLACE])
def test_everyone_trains_the_same_model_in_the_same_way(name):
    size = training.Size(layers=2, width=8, heads=2, vocabulary=11, context=5, batch=2)
    everyone = training.candidates(size, CPU)
    own, other = everyone[name](), everyone[training.TORCH]()
    start = clone(own.params())
    for _ in range(3):
        own.step()
        other.step()
    assert_close(own.params(), other.params())
    moved = [torch.dist(a, b) for a, b in zip(own.params().values(), start.values(), strict=True)]
    assert min(moved) > 0


def test_memory_that_a_graph_keeps_is_counted_once():
    weight = torch.ones(1000, requires_grad=True)

    def squares():
        middle = weight + 1
        return (middle * middle).sum()  # keeps `middle` twice

    assert unroll._bytes_held(squares) == 4000 + 4


def test_both_kinds_of_inner_gradient_lead_to_one_meta_gradient():
    own, other = (
        unroll_long._WAYS[name]()(3) for name in (unroll_long._FUNC, unroll_long._AUTOGRAD)
    )
    assert_close(own, other)
    assert all(slope.any() for slope in own)


def test_a_process_that_takes_too_long_is_stopped():
    with pytest.raises(OutOfTime):
        ask("compiling", "mlp-tiny", limit=0.1, environment={})


def test_the_trees_are_of_the_size_that_their_names_say():
    sizes = {name: (elements(shapes), len(shapes)) for name, shapes in SHAPES.items()}
    assert sizes["gpt2-60m"] == (64_085_504, 148)
    assert sizes["resnet-25m"] == (25_557_032, 161)
    assert sizes["leaves-2000"] == (128_000, 2000)
    assert sizes["mlp-tiny"] == (676, 4)
