"""Classes sharded over ranks: who holds which, and what travels between them. The only file that knows torch.distributed.

A mesh of ranks, ``[shards]`` or ``[replicas, shards]``: along the last dimension each rank holds a contiguous shard of the
classes, as DTensor's ``Shard(0)`` lays them out (⌈C/ranks⌉ each, the last ones fewer or none); along the first, if there is
one, ranks hold the same classes and see other rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

# A batch's size says in the exchange of sizes that its rank was given wrong arguments.
_REFUSED = -1

_PIECE_ELEMENTS = 1 << 22  # of rows that are shared out anew, at a time

# PyTorch 2.13 names them anew and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def is_initialized() -> bool:
    """Whether there is a process group to shard over."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Ranks of the default group, which there is."""
    return dist.get_world_size()


def check_alone() -> None:
    """That a head without a mesh is meant to be one: it was made while there was no process group.

    Raises:
        RuntimeError: there is one now, of several ranks.
    """
    if is_initialized():
        if dist.get_world_size() > 1:
            raise RuntimeError(
                "ShardedAMSoftmaxLoss was made before torch.distributed.init_process_group, so that each of the "
                f"{dist.get_world_size()} ranks has a head of its own: make the head after the process group"
            )
    elif _launched() > 1:
        warnings.warn(
            f"ShardedAMSoftmaxLoss has all classes in this process, one of {_launched()} (WORLD_SIZE), as there is no "
            "process group: call torch.distributed.init_process_group before the head is made",
            RuntimeWarning,
            stacklevel=3,
        )


check_alone._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it once, as it traces


def _launched() -> int:
    """Processes that a launcher like torchrun has started."""
    value = os.environ.get("WORLD_SIZE", "")
    return int(value) if value.isdigit() else 1


@dataclass(frozen=True)
class Rows:
    """How many rows each rank brings, ``sizes[replica][shard]``, in the order in which they are put together."""

    sizes: tuple[tuple[int, ...], ...]
    replica: int
    shard: int

    @property
    def of_replica(self) -> tuple[int, ...]:
        """Sizes of the ranks whose rows this one is given."""
        return self.sizes[self.replica]

    @property
    def per_replica(self) -> tuple[int, ...]:
        return tuple(sum(each) for each in self.sizes)

    @property
    def replica_slice(self) -> slice:
        """This replica's rows among all."""
        start = sum(self.per_replica[: self.replica])
        return slice(start, start + self.per_replica[self.replica])

    @property
    def local_slice(self) -> slice:
        """This rank's rows among all."""
        start = self.replica_slice.start + sum(self.of_replica[: self.shard])
        return slice(start, start + self.of_replica[self.shard])


class ClassShards:
    """The classes of one head over a mesh of ranks; without a mesh, one rank has them all and nothing travels."""

    def __init__(self, num_classes: int, mesh: DeviceMesh | None) -> None:
        self.num_classes, self.mesh = num_classes, mesh
        if mesh is not None and mesh.get_coordinate() is None:
            raise ValueError("mesh must contain every rank that makes the head, but this rank is not in it")
        self._group = None if mesh is None else mesh.get_group(mesh.ndim - 1)
        self._replicas = None if mesh is None or mesh.ndim == 1 else mesh.get_group(0)
        self.shard, self.shards = _rank_and_size(self._group)
        self.replica, self.replicas = _rank_and_size(self._replicas)
        self.start, self.stop = self.bounds(self.shard)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassShards:
        return self  # a copied head's ranks are the same

    @property
    def world_size(self) -> int:
        """Ranks that bring rows."""
        return self.shards * self.replicas

    @property
    def classes(self) -> int:
        """Classes on this rank, 0 where there are fewer than ranks."""
        return self.stop - self.start

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first class of a shard and the one past its last."""
        each = -(-self.num_classes // self.shards)
        return min(shard * each, self.num_classes), min((shard + 1) * each, self.num_classes)

    @property
    def placements(self) -> Sequence[Placement]:
        return [Shard(0)] if self.replicas == 1 and self._replicas is None else [Replicate(), Shard(0)]

    def distribute(self, local: Tensor) -> Tensor:
        """This rank's rows ``[classes, ...]`` as a DTensor ``[C, ...]`` over the mesh."""
        if self.mesh is None:
            return local
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def local_labels(self, labels: Tensor) -> Tensor:
        """Canonical labels counted from this shard's first class; the number of its classes where it has not the target."""
        local = labels - self.start
        absent = (labels >= 0) & ((local < 0) | (local >= self.classes))
        return local.masked_fill_(absent, self.classes).masked_fill_(labels < 0, -1)

    def agree_on_rows(self, batch: int, agreed: Mapping[str, Any], error: Exception | None, device: torch.device) -> Rows:
        """Every rank's number of rows; ``agreed``, of the same names everywhere, is what must be alike.

        Raises:
            ValueError: the ranks were given different ``agreed``, or another rank has an ``error``.
            Exception: this rank's own ``error``. All ranks raise, so that none is left waiting.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return Rows(((batch,),), 0, 0)
        table = self._exchanged([_REFUSED if error else batch, _digest(list(agreed.items()))], device)
        if error is not None:
            raise error
        for who, (size, _) in self._named(table):
            if size == _REFUSED:
                raise ValueError(f"{who} of the mesh was given a wrong argument; its own error says which")
        if len({digest for ranks in table for _, digest in ranks}) > 1:
            self._refuse(agreed, device)
        return Rows(tuple(tuple(size for size, _ in ranks) for ranks in table), self.replica, self.shard)

    def _exchanged(self, numbers: list[int], device: torch.device) -> list[list[list[int]]]:
        """Every rank's, by replica and shard."""
        mine = torch.tensor(numbers).to(self._host_device(device))
        with _explained("exchanging the batches' sizes"):
            everyone = _gather(mine[None], self._group)
            table: list[list[list[int]]] = _gather(everyone[None], self._replicas).tolist()
        return table

    def _named(self, table: list[list[list[int]]]) -> Iterator[tuple[str, list[int]]]:
        for replica, ranks in enumerate(table):
            for shard, theirs in enumerate(ranks):
                yield f"rank {shard}" if self.replicas == 1 else f"rank {shard} of replica {replica}", theirs

    def _refuse(self, agreed: Mapping[str, Any], device: torch.device) -> NoReturn:
        """Say what differs, once all ranks know that something does."""
        mine = [_digest(value) for value in agreed.values()]
        table = self._exchanged(mine, device)
        who, theirs = next(each for each in self._named(table) if each[1] != mine)
        apart = [name for name, own, other in zip(agreed, mine, theirs, strict=True) if own != other]
        raise ValueError(
            "features must have the same D and dtype, and all options be alike, on every rank: "
            f"{who} differs from this one's {', '.join(f'{name}={agreed[name]!r}' for name in apart)}"
        )

    def equal_rows(self, batch: int) -> Rows:
        """As if every rank had as many rows as this one: nothing is exchanged."""
        return Rows(((batch,) * self.shards,) * self.replicas, self.replica, self.shard)

    def gather_rows(self, features: Tensor, labels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` and labels ``[B]`` of all shards' rows, in one all-gather of both."""
        if self.shards == 1:
            return features, labels
        width = features.shape[1] * features.element_size()
        packed = torch.cat([features.contiguous().view(torch.uint8), labels[:, None].view(torch.uint8)], 1)
        with _explained("gathering features and labels"):
            packed = _gather_uneven(packed, rows.of_replica, self._group)
        return packed[:, :width].contiguous().view(features.dtype), packed[:, width:].contiguous().view(torch.int64)[:, 0]

    def gather_replicas(self, vectors: Tensor, rows: Rows) -> Tensor:
        """Vectors ``[n, B]`` of every replica's rows, put together: ``[n, all rows]``."""
        if self.replicas == 1:
            return vectors
        with _explained("gathering the replicas' rows"):
            return _gather_uneven(vectors.T.contiguous(), rows.per_replica, self._replicas).T

    def gather_local(self, vector: Tensor, rows: Rows) -> Tensor:
        """A vector of this rank's own rows, of every rank: ``[all rows]``."""
        if self.shards > 1:
            with _explained("gathering the upstream gradient"):
                vector = _gather_uneven(vector.contiguous(), rows.of_replica, self._group)
        return self.gather_replicas(vector[None], rows)[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Summed over the shards, in place."""
        return self._reduce_(tensor, dist.ReduceOp.SUM, self._group, "summing over the shards")

    def maximum_(self, tensor: Tensor) -> Tensor:
        """The largest of the shards, in place."""
        return self._reduce_(tensor, dist.ReduceOp.MAX, self._group, "finding the largest over the shards")

    def sum_replicas_(self, tensor: Tensor) -> Tensor:
        """Summed over the replicas, in place."""
        return self._reduce_(tensor, dist.ReduceOp.SUM, self._replicas, "summing over the replicas")

    def _reduce_(self, tensor: Tensor, op: Any, group: dist.ProcessGroup | None, doing: str) -> Tensor:
        if group is not None and dist.get_world_size(group) > 1 and tensor.numel():
            with _explained(doing):
                dist.all_reduce(tensor, op, group)
        return tensor

    def scatter_rows(self, tensor: Tensor, rows: Rows) -> Scattered:
        """``[B, D]`` of all shards' rows, summed over the shards; each rank keeps its own. Starts, and returns a handle."""
        sizes = rows.of_replica
        if self.shards == 1 or not any(sizes):
            return Scattered(tensor, None, tensor)
        largest = max(sizes)
        if min(sizes) < largest:
            padded = tensor.new_zeros(self.shards, largest, *tensor.shape[1:])
            for each, part in zip(padded, tensor.split(sizes), strict=True):
                each[: len(part)] = part
            tensor = padded.flatten(0, 1)
        result = tensor.new_empty(largest, *tensor.shape[1:])
        with _explained("scattering the features' gradient"):
            work = _reduce_scatter(result, tensor.contiguous(), group=self._group, async_op=True)
        return Scattered(result[: sizes[self.shard]], work, tensor)

    def take_rows(self, local: Tensor, wanted: Tensor) -> Tensor:
        """Rows of a ``[C, ...]`` tensor of which ``local`` is this rank's part: those of classes ``wanted [n]``.

        Zeros where ``wanted`` is -1. Every rank must call it; all rows pass by, in pieces of a few MB.
        """
        result = local.new_zeros(len(wanted), *local.shape[1:])
        piece = max(_PIECE_ELEMENTS // max(local[:1].numel(), 1), 1)
        for shard in range(self.shards):
            start, stop = self.bounds(shard)
            for first in range(start, stop, piece):
                last = min(first + piece, stop)
                if shard == self.shard:
                    rows = local[first - start : last - start].contiguous()
                else:
                    rows = local.new_empty(last - first, *local.shape[1:])
                if self._group is not None and self.shards > 1:
                    with _explained("sharing out rows anew"):
                        dist.broadcast(rows, group=self._group, group_src=shard)
                here = ((wanted >= first) & (wanted < last)).nonzero()[:, 0]
                result[here] = rows[wanted[here] - first]
        return result

    def _host_device(self, device: torch.device) -> torch.device:
        """Where numbers of the host travel: on the CPU if the groups serve it, so that no GPU is waited for."""
        on_cpu = all(_has_cpu(group) for group in (self._group, self._replicas) if group is not None)
        assert self.mesh is not None
        kind = device.type if device.type not in ("cpu", "meta") else self.mesh.device_type
        return torch.device("cpu") if on_cpu or kind == "cpu" else torch.device(kind, torch.cuda.current_device())

    def broadcast_int(self, value: int, device: torch.device) -> int:
        """The first rank's value."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], device=self._host_device(device))
        with _explained("agreeing on a seed"):
            values = _gather(values, self._group)[:1]
            return int(_gather(values, self._replicas)[0])


@dataclass
class Scattered:
    """A reduce-scatter under way."""

    result: Tensor
    work: Any
    sent: Tensor  # must live until it is done

    def wait(self) -> Tensor:
        if self.work is not None:
            with _explained("scattering the features' gradient"):
                self.work.wait()
        return self.result


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows, differentiable; a plain tensor is its own."""
    if isinstance(tensor, DTensor):
        local: Tensor = tensor.to_local()
        return local
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """All ranks' rows, differentiable. Every rank must call it."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor


def default_mesh(device: torch.device) -> DeviceMesh:
    """All ranks of the default group, for tensors on ``device`` (where they will be put later, if it is "meta")."""
    kind = device.type
    if kind == "meta":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return DeviceMesh(kind, list(range(dist.get_world_size())), mesh_dim_names=("classes",))


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _has_cpu(group: dist.ProcessGroup) -> bool:
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Tensors of one size, end to end along the first dimension."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    result = tensor.new_empty(dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:])
    _all_gather(result, tensor.contiguous(), group)
    return result


def _gather_uneven(tensor: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Tensors of ``sizes`` rows, end to end: padded on the way to the largest."""
    largest = max(sizes)
    if largest == 0:
        return tensor
    if min(sizes) == largest:
        return _gather(tensor, group)
    padded = tensor.new_zeros(largest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    everyone = _gather(padded, group).view(len(sizes), *padded.shape)
    return torch.cat([each[:size] for each, size in zip(everyone, sizes, strict=True)])


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """What the process group says when a rank is gone, with what was being done."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"ShardedAMSoftmaxLoss: {doing} failed: {error} (has another rank died, is it late beyond the process group's "
            "timeout, or was it given something else?)"
        ) from error
