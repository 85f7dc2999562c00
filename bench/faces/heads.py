"""The losses that are no kernels of the package, in plain PyTorch: softmax, L-Softmax and the centre loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsoftmax_kernels.margins import SphereFaceMargin


class SoftmaxLoss(nn.Module):
    """A linear layer without bias and cross-entropy: the plain softmax loss of the paper's tables."""

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_dim, num_classes, bias=False)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(features), labels)


class LSoftmaxLoss(SoftmaxLoss):
    """L-Softmax (Liu et al. 2016, equation 7 and section 5.1): the own class's logit is ‖w‖‖x‖·(λ·cos θ + ψ(θ))/(1 + λ).

    ψ and the form of λ are those of A-Softmax; here neither features nor centres are normalized.
    """

    def __init__(self, embedding_dim: int, num_classes: int, margin: SphereFaceMargin) -> None:
        super().__init__(embedding_dim, num_classes)
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = self.classifier(features)
        own = logits.gather(1, labels[:, None])[:, 0]
        norm = torch.linalg.vector_norm(features, dim=1)
        length = (norm * torch.linalg.vector_norm(self.classifier.weight, dim=1)[labels]).clamp(min=1e-12)
        target = length * self.margin(own / length, labels, norm)
        return F.cross_entropy(logits.scatter(1, labels[:, None], target[:, None]), labels)


class CentreLoss(SoftmaxLoss):
    """Softmax + λ·½·mean‖x − c_y‖² (Wen et al. 2016, equation 5), the mean over the batch as in the authors' code.

    Centres c are no parameters. After each batch in training mode a class's centre moves by α·Σ(x − c)/(1 + n), over the n
    features of that class in the batch (equations 3 and 4).
    """

    centres: Tensor

    def __init__(self, embedding_dim: int, num_classes: int, weight: float = 0.008, alpha: float = 0.5) -> None:
        super().__init__(embedding_dim, num_classes)
        self.weight, self.alpha = weight, alpha
        self.register_buffer("centres", torch.zeros(num_classes, embedding_dim))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        away = features - self.centres[labels]
        if self.training:
            self._move(away.detach(), labels)
        return super().forward(features, labels) + self.weight * 0.5 * away.square().sum(1).mean()

    @torch.no_grad()
    def _move(self, away: Tensor, labels: Tensor) -> None:
        total = torch.zeros_like(self.centres).index_add_(0, labels, away)
        count = torch.bincount(labels, minlength=len(self.centres))
        self.centres += self.alpha * total / (1 + count)[:, None]
