"""A training of a backbone and the sharded head: one step of it, and the verification of what it has learnt."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amsoftmax_kernels import ShardedAMSoftmaxLoss
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from . import synthetic
from .data import Source
from .ranks import Ranks

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DROPOUT = 2  # a stream of random numbers; the data has 0 and 1


class Training:
    """The state of a training and its step: the same on every rank but for the classes' shard and the batches.

    The backbone and the head each have an optimizer: the backbone's parameters are plain tensors, alike on all ranks, the
    head's centres a DTensor.
    """

    def __init__(self, args: argparse.Namespace, source: Source, ranks: Ranks) -> None:
        self.args, self.source, self.ranks = args, source, ranks
        self.step = 0  # steps done
        device = ranks.device
        torch.manual_seed(args.seed)  # the same weights on every rank
        self.network = source.network(args.dim).to(device)
        self.backbone: nn.Module = self.network
        if ranks.size > 1:
            devices = None if device.type == "cpu" else [device.index]
            self.backbone = DistributedDataParallel(self.network, device_ids=devices)
            self._settle_buckets()
        self.head = ShardedAMSoftmaxLoss(
            args.dim, source.num_classes, args.scale, args.margin, backend=args.backend, save_bytes=args.save_bytes,
            sample_rate=args.sample_rate, sampling_correction=args.sampling_correction, equal_batches=True,
            seed=args.seed, device=device, dtype=DTYPES[args.dtype],
        )  # fmt: skip
        self.backbone_optimizer = _optimizer(args, self.backbone, args.lr)
        self.head_optimizer = _optimizer(args, self.head, args.head_lr)
        self.autocast = AUTOCAST[args.autocast]
        # The backbone's gradients alone can be too small for float16: the head makes its own in float32.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast == torch.float16)

    def _settle_buckets(self) -> None:
        """A backward pass that is thrown away, after which gradients are put together in the order in which they come.

        DistributedDataParallel does so after its first step, and sums over three ranks or more may then round differently:
        the first step of a resumed run would not be what it is in one that was not interrupted.
        """
        self.network.eval()  # leaves a batch norm's statistics alone
        inputs, _ = self.source.batch(2, self.ranks.rank, 0)
        self.backbone(inputs).sum().backward()
        self.network.zero_grad()
        self.network.train()

    def train_step(self, predict: bool) -> tuple[Tensor, Tensor | None]:
        """One step; the loss over all ranks' rows, and how many of this rank's rows were predicted right if asked."""
        args, rank = self.args, self.ranks.rank
        factor = lr_factor(self.step, args.steps)
        for optimizer, lr in ((self.backbone_optimizer, args.lr), (self.head_optimizer, args.head_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        inputs, labels = self.source.batch(args.batch, rank, self.step)
        torch.manual_seed(synthetic.generator_of(args.seed, _DROPOUT, rank, self.step).initial_seed())
        self.backbone_optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        with self._autocast():
            features = self.backbone(inputs)
            if self.scaler.is_enabled():
                features = self._scaled_backward(features.float())
            result = self.head(features, labels, return_predictions=predict)
            loss, predictions = result if predict else (result, None)
        loss.backward()
        self.scaler.step(self.backbone_optimizer)
        self.head_optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.step += 1
        return loss.detach(), None if predictions is None else (predictions == labels).sum()

    def _scaled_backward(self, features: Tensor) -> Tensor:
        """``features``, whose gradient is multiplied by the loss scale on its way into the backbone."""
        self.scaler.scale(features.new_zeros(()))  # the scaler makes its scale when it is first used
        scale = self.scaler.get_scale()
        if features.requires_grad:
            features.register_hook(lambda grad: grad * scale)
        return features

    def _autocast(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast(self.ranks.device.type, self.autocast)

    @torch.no_grad()
    def verify(self) -> dict[str, float]:
        """The source's rates on what is in no batch. On one rank."""
        self.network.eval()
        rates = self.source.verification(self.network)
        self.network.train()
        return rates


def lr_factor(step: int, steps: int | None) -> float:
    """Of the learning rate: a linear warm-up, then half a cosine down to 0 where the number of steps is known."""
    warmup = 20 if steps is None else max(min(steps // 20, 1000), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if steps is None else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _optimizer(args: argparse.Namespace, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """That of the backbone or the head; a fused one updates the head's centres in the backward pass."""
    sgd = {"lr": lr, "momentum": args.momentum, "weight_decay": args.weight_decay}
    adamw = {"lr": lr, "weight_decay": args.weight_decay}
    if args.optimizer.startswith("fused-") and isinstance(module, ShardedAMSoftmaxLoss):
        return FusedSGD(module, **sgd) if args.optimizer == "fused-sgd" else FusedAdamW(module, **adamw)
    parameters = module.parameters()
    return torch.optim.SGD(parameters, **sgd) if args.optimizer.endswith("sgd") else torch.optim.AdamW(parameters, **adamw)
