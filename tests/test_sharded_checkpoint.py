"""Checkpoints that fit any number of ranks, InsightFace's files, and what happens when a rank dies."""

from __future__ import annotations

import copy
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import amsoftmax_kernels as ak
from amsoftmax_kernels.insightface import load_centres, save_centres
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD
from amsoftmax_kernels.sharded.shards import whole

from .ranks import Ranks, device

C, D = 21, 6
OPTIMIZERS = {
    "sgd": lambda head: torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda head: torch.optim.AdamW(head.parameters(), lr=0.01),
    "fused sgd": lambda head: FusedSGD(head, lr=0.1, momentum=0.9),
    "fused adamw": lambda head: FusedAdamW(head, lr=0.01),
    "fused sgd, sampled": lambda head: FusedSGD(head, lr=0.1, momentum=0.9),
}


def make(kind: str, seed: int) -> tuple[ak.ShardedAMSoftmaxLoss, torch.optim.Optimizer]:
    sampled = {"sample_rate": 0.5} if "sampled" in kind else {}
    head = ak.ShardedAMSoftmaxLoss(
        D, C, torch.nn.Parameter(torch.tensor(20.0)), torch.rand(C, generator=torch.Generator().manual_seed(seed)),
        seed=seed, device=device(), **sampled,
    )  # fmt: skip
    return head, OPTIMIZERS[kind](head)


def step(head: ak.ShardedAMSoftmaxLoss, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    """One step on rows that all ranks together have, whatever their number."""
    generator = torch.Generator().manual_seed(number)
    x, labels = (
        torch.randn(24, D, generator=generator).to(device()),
        torch.randint(C, (24,), generator=generator).to(device()),
    )
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    loss = head(x.chunk(world)[rank], labels.chunk(world)[rank])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def state(head: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything of head and optimizer, whole."""
    result = {name: whole(value) for name, value in head.state_dict().items()}
    for i, parameter in enumerate(head.parameters()):
        result.update({f"{i} {name}": whole(value) for name, value in optimizer.state[parameter].items()})
    return {name: value.detach().cpu().clone() for name, value in result.items() if isinstance(value, Tensor)}


def set_whole(centres: Tensor) -> list[Tensor]:
    """Centres of one process, and of a head like this one, set in a head of this rank."""
    head, other = (ak.ShardedAMSoftmaxLoss(D, C, seed=seed, device=device()) for seed in (1, 2))
    head.set_centres(centres.to(device()))
    other.set_centres(head.weight.detach())
    first = other.weight.to_local().clone()
    other.reset_parameters()
    assert not len(first) or not torch.equal(other.weight.to_local(), first)
    return [whole(head.weight).detach(), first, whole(other.weight).detach()]


def test_centres_are_set_on_every_rank(ranks: Ranks) -> None:
    centres = torch.randn(C, D)
    alone = ak.ShardedAMSoftmaxLoss(D, C, seed=2)
    alone.reset_parameters()
    found = ranks.run(3, set_whole, centres)
    assert all(torch.equal(each[0], centres) and torch.equal(each[2], alone.weight) for each in found)
    assert torch.equal(torch.cat([each[1] for each in found]), centres)


def load_whole(centres: dict[str, Tensor]) -> list[Tensor]:
    """Centres of one process into a head of this rank, in three ways; and into one beside other modules."""
    head, assigned = (ak.ShardedAMSoftmaxLoss(D, C, device=device()) for _ in range(2))
    head.load_state_dict(centres)
    assigned.load_state_dict(centres, assign=True)
    made = ak.ShardedAMSoftmaxLoss(D, C, device="meta", dtype=torch.bfloat16)
    made.load_state_dict(centres, assign=True)
    assert not made.weight.to_local().is_meta and made.weight.dtype == torch.float32
    both = torch.nn.ModuleDict({"head": ak.ShardedAMSoftmaxLoss(D, C, device=device())})
    both.load_state_dict({f"head.{name}": value for name, value in centres.items()})
    heads = (head, assigned, made, both["head"])
    for each in heads:
        each(torch.ones(2, D, device=device()), torch.tensor([0, 1], device=device())).backward()
    return [whole(each.weight).detach().cpu() for each in heads]


@pytest.mark.parametrize("world", [2, 5])
def test_centres_of_one_process_are_loaded(world: int, ranks: Ranks) -> None:
    head = ak.AMSoftmaxLoss(D, C)
    before = head.weight.detach().clone()
    for found in ranks.run(world, load_whole, head.state_dict()):
        assert all(torch.equal(each, before) for each in found)
    assert torch.equal(head.weight, before)
    short = ak.AMSoftmaxLoss(D, C - 1).state_dict()
    with pytest.raises(AssertionError, match="size mismatch for weight"):
        ranks.run(world, load_whole, short)


def save(kind: str, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    head, optimizer = make(kind, 1)
    for number in range(3):
        step(head, optimizer, number)
    model, optimizers = get_state_dict(head, optimizer)
    dcp.save({"head": model, "optimizer": optimizers}, checkpoint_id=folder)
    return state(head, optimizer), step(head, optimizer, 3)


def load(kind: str, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    head, optimizer = make(kind, 2)
    model, optimizers = get_state_dict(head, optimizer)
    both = {"head": model, "optimizer": optimizers}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(head, optimizer, model_state_dict=both["head"], optim_state_dict=both["optimizer"])
    return state(head, optimizer), step(head, optimizer, 3)


@pytest.mark.parametrize(
    "saved, loaded, kind",
    [
        (8, 3, "sgd"),
        (3, 8, "adamw"),
        (3, 1, "sgd"),
        (1, 4, "adamw"),
        (3, 2, "fused sgd"),
        (1, 3, "fused adamw"),
        (2, 2, "fused sgd, sampled"),
    ],
)
def test_saved_on_some_ranks_and_loaded_on_others(ranks: Ranks, tmp_path: Path, saved: int, loaded: int, kind: str) -> None:
    before, next_loss = ranks.run(saved, save, kind, str(tmp_path))[0]
    for after, loss in ranks.run(loaded, load, kind, str(tmp_path)):
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name
        # Draws depend on the number of ranks; all else does not.
        if saved == loaded:
            assert torch.equal(loss, next_loss)
        elif "sampled" not in kind:
            torch.testing.assert_close(loss, next_loss)


def test_loaded_without_a_process_group(ranks: Ranks, tmp_path: Path) -> None:
    before, _ = ranks.run(3, save, "sgd", str(tmp_path))[0]
    head = ak.AMSoftmaxLoss(D, C, torch.nn.Parameter(torch.tensor(1.0)), torch.zeros(C))
    dcp.load({"head": (model := head.state_dict())}, checkpoint_id=str(tmp_path), no_dist=True)
    head.load_state_dict(model)
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name


def copy_and_pickle() -> None:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=1, sample_rate=0.5, device=device())
    for module in (head, torch.nn.Sequential(head)):
        with pytest.raises(TypeError, match=r"save head\.state_dict\(\)"):
            torch.save(module, io.BytesIO())
    copied = copy.deepcopy(head)
    x, labels = torch.ones(2, D, device=device()), torch.tensor([0, 1], device=device())
    assert copied.weight is not head.weight and copied.sampling_state is not head.sampling_state
    assert torch.equal(copied(x, labels), head(x, labels))
    copied(x, labels).backward()
    assert copied.weight.grad is not None and head.weight.grad is None


def test_a_sharded_head_is_copied_but_not_pickled(ranks: Ranks) -> None:
    ranks.run(2, copy_and_pickle)
    head = ak.ShardedAMSoftmaxLoss(D, C)  # without a group there is nothing that cannot be
    torch.save(head, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight, head.weight)


def write_insightface(folder: Path, weight: Tensor, world: int) -> None:
    """Files as PartialFC_V2 leaves them: the first C mod W ranks have one class more."""
    each, longer = divmod(len(weight), world)
    parts = weight.split([each + (rank < longer) for rank in range(world)])
    for rank, part in enumerate(parts):
        checkpoint = {
            "epoch": 3, "global_step": 7, "state_dict_backbone": {"w": torch.zeros(2)},
            "state_dict_softmax_fc": {"weight": part.clone()}, "state_optimizer": {"state": {}, "param_groups": []},
        }  # fmt: skip
        torch.save(checkpoint, folder / f"checkpoint_gpu_{rank}.pt")


def import_centres(folder: str) -> Tensor:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=1, device=device())
    load_centres(head, folder)
    return whole(head.weight).detach().cpu()


@pytest.mark.parametrize("written, world", [(4, 3), (3, 4), (1, 2), (8, 1)])
def test_insightface_files_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path, written: int, world: int) -> None:
    weight = torch.randn(C, D)
    write_insightface(tmp_path, weight, written)
    for result in ranks.run(world, import_centres, str(tmp_path)):
        assert torch.equal(result, weight)
    head = ak.AMSoftmaxLoss(D, C)
    load_centres(head, tmp_path, written)
    assert torch.equal(head.weight, weight)


def export_centres(folder: str, written: int | None) -> Tensor:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=1, device=device())
    save_centres(head, folder, written)
    return whole(head.weight).detach().cpu()


@pytest.mark.parametrize("written, world", [(None, 3), (4, 3), (2, 5), (30, 2), (1, 1)])
def test_centres_are_written_as_insightface_reads_them(
    ranks: Ranks, tmp_path: Path, written: int | None, world: int
) -> None:
    weight = ranks.run(world, export_centres, str(tmp_path / "new"), written)[0]
    files = written or world
    each, longer = divmod(C, files)
    parts = []
    for rank in range(files):
        content = torch.load(tmp_path / "new" / f"checkpoint_gpu_{rank}.pt", weights_only=True)
        parts.append(content["state_dict_softmax_fc"]["weight"])
        assert len(parts[-1]) == each + (rank < longer) and parts[-1].untyped_storage().nbytes() == parts[-1].nbytes
    assert torch.equal(torch.cat(parts), weight) and len(list((tmp_path / "new").iterdir())) == files
    with pytest.raises(FileExistsError, match="checkpoint_gpu_0"):
        save_centres(ak.AMSoftmaxLoss(D, C), tmp_path / "new")


def test_insightface_files_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    head = ak.AMSoftmaxLoss(D, C)
    before = head.weight.detach().clone()
    with pytest.raises(FileNotFoundError, match="checkpoint_gpu_0"):
        load_centres(head, tmp_path)
    write_insightface(tmp_path, torch.randn(C + 2, D), 3)
    with pytest.raises(ValueError, match=re.escape("should have shape [7, 6], but it has [8, 6]")):
        load_centres(head, tmp_path)
    write_insightface(tmp_path, torch.randn(C, D), 3)
    (tmp_path / "checkpoint_gpu_2.pt").unlink()
    with pytest.raises(FileNotFoundError):
        load_centres(head, tmp_path, 3)
    torch.save({"state_dict_backbone": {}}, tmp_path / "checkpoint_gpu_2.pt")
    with pytest.raises(ValueError, match=r"checkpoint_gpu_2\.pt has no"):
        load_centres(head, tmp_path)
    assert torch.equal(head.weight, before)


def old_files(folder: Path, weight: Tensor, world: int, zipped: bool) -> None:
    """Files as PartialFC left them: a tensor alone, its momentum beside it."""
    each, longer = divmod(len(weight), world)
    for rank, part in enumerate(weight.split([each + (rank < longer) for rank in range(world)])):
        for name, value in (("weight", part.clone()), ("weight_mom", torch.full_like(part, 7))):
            path = folder / f"rank_{rank}_softmax_{name}.pt"
            torch.save(value, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_insightface_files_of_older_code(tmp_path: Path, zipped: bool) -> None:
    weight = torch.randn(C, D)
    old_files(tmp_path, weight, 3, zipped)
    for world_size in (None, 3):
        load_centres(head := ak.AMSoftmaxLoss(D, C), tmp_path, world_size)
        assert torch.equal(head.weight, weight)
    with pytest.raises(FileNotFoundError, match=r"files of 4 ranks, but .* has no rank_3_softmax_weight\.pt"):
        load_centres(head, tmp_path, 4)
    with pytest.raises(ValueError, match=re.escape("over 2 ranks: rank_0_softmax_weight.pt should have shape [11, 6]")):
        load_centres(head, tmp_path, 2)
    for path in tmp_path.glob("*_weight.pt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint_gpu_0\.pt or rank_0_softmax_weight\.pt"):
        load_centres(head, tmp_path)
    assert torch.equal(head.weight, weight)


def test_insightface_files_of_other_shapes(tmp_path: Path) -> None:
    weight = torch.randn(C, D)
    torch.save(weight, tmp_path / "checkpoint_gpu_0.pt")  # a tensor alone
    load_centres(head := ak.AMSoftmaxLoss(D, C), tmp_path)
    assert torch.equal(head.weight, weight)
    unzipped = {"state_dict_softmax_fc": {"weight": -weight}}
    torch.save(unzipped, tmp_path / "checkpoint_gpu_0.pt", _use_new_zipfile_serialization=False)
    load_centres(head, tmp_path)
    assert torch.equal(head.weight, -weight)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.95])
def test_an_insightface_file_that_is_cut_short_is_named(tmp_path: Path, zipped: bool, kept: float) -> None:
    old_files(tmp_path, torch.randn(C, D), 2, zipped)
    path = tmp_path / "rank_1_softmax_weight.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read")):
        load_centres(ak.AMSoftmaxLoss(D, C), tmp_path)


def test_what_cannot_take_insightface_files(tmp_path: Path) -> None:
    old_files(tmp_path, torch.randn(C, D), 1, True)
    for world_size, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="world_size must be"):
            load_centres(ak.AMSoftmaxLoss(D, C), tmp_path, world_size)  # type: ignore[arg-type]
        with pytest.raises(error, match="world_size must be"):
            save_centres(ak.AMSoftmaxLoss(D, C), tmp_path / "new", world_size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"head must hold its centres.*to_empty"):
        load_centres(ak.AMSoftmaxLoss(D, C, device="meta"), tmp_path)
    with pytest.raises(ValueError, match=r"head must hold its centres.*to_empty"):
        save_centres(ak.AMSoftmaxLoss(D, C, device="meta"), tmp_path / "new")
    torch.save({"state_dict_softmax_fc": Path("centres")}, tmp_path / "checkpoint_gpu_0.pt")
    with pytest.raises(ValueError, match=r"checkpoint_gpu_0\.pt cannot be read with weights_only=True"):
        load_centres(ak.AMSoftmaxLoss(D, C), tmp_path)


# A run of torchrun's: each rank says that it is there; after some steps rank 1 is killed in the middle of one.
WORKER = """
    import datetime, os, signal, sys, time
    import torch, torch.distributed as dist
    import amsoftmax_kernels as ak

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    rank = dist.get_rank()
    head = ak.ShardedAMSoftmaxLoss(16, 500, seed=1)
    backward = ak.functional.backends.load("chunked").backward

    def dying(*arguments):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*arguments)

    ak.functional.backends.load("chunked").backward = dying
    for step in range(1000):
        try:
            head(torch.randn(8, 16, requires_grad=True), torch.randint(500, (8,))).backward()
        except RuntimeError as error:
            print(f"rank {rank} step {step}: {error}", flush=True)
            open(os.path.join(sys.argv[1], f"failed{rank}"), "w").write(str(error))
            raise
"""


def test_a_killed_rank_fails_the_others_with_a_clear_error(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # A launcher whose monitor is slow, so that the others fail by themselves and are not stopped by it.
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--monitor-interval", "5",
        str(script), str(tmp_path),
    ]  # fmt: skip
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode != 0, process.stdout
    for rank in (0, 2):
        message = (tmp_path / f"failed{rank}").read_text()
        assert re.search("ShardedAMSoftmaxLoss: .* failed: .*has another rank died", message)
    assert f"Signal {signal.SIGKILL.value}" in process.stderr or "SIGKILL" in process.stderr
