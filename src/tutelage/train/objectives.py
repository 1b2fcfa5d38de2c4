"""The two objectives of the loop: cross-entropy on labels, and distillation from stored targets.

Each picks the targets of a packed row and hands hidden states and head to `fused.fused_loss`; the
mathematics is in `losses.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.models.load import BackboneAndHead
from tutelage.recipe.tables import Distill
from tutelage.targets.batch import pad_targets
from tutelage.targets.schema import TokenTargets
from tutelage.train.batches import PackedRow
from tutelage.train.fused import fused_loss
from tutelage.train.loop import RowLoss
from tutelage.train.losses import SparseTarget
from tutelage.train.spec import CROSS_ENTROPY, LossSpec, Term


class CrossEntropy:
    """SFT: mean negative log-probability of the labels, nats a token."""

    def __call__(self, hidden_ND: Tensor, head: BackboneAndHead, row: PackedRow) -> RowLoss:
        """Summed over the row's targets."""
        labels_N = torch.from_numpy(row.labels_N).to(hidden_ND.device)
        out = fused_loss(
            hidden_ND, head.weight_VD, SparseTarget.labels_only(labels_N), CROSS_ENTROPY,
            bias_V=head.bias_V, softcap=head.softcap,
        )  # fmt: skip
        return RowLoss(out.loss_sum, {})


@dataclass(frozen=True)
class Distillation:
    """`(1 - lam) * CE + lam * KD` on the stored targets of the rows that were packed."""

    spec: LossSpec
    temperature: float
    """At which the teacher's probabilities were stored."""
    targets: Callable[[int], TokenTargets]
    """The targets of an example; its first tokens are used, as many as were packed."""

    def __call__(self, hidden_ND: Tensor, head: BackboneAndHead, row: PackedRow) -> RowLoss:
        """Summed over the row's targets, with the parts a person would ask for."""
        parts = [
            self.targets(index).first(count)
            for index, count in zip(row.examples, row.counts, strict=True)
        ]
        out = fused_loss(
            hidden_ND, head.weight_VD, self._target(parts, row, hidden_ND.device), self.spec,
            bias_V=head.bias_V, softcap=head.softcap,
        )  # fmt: skip
        metrics = out.metrics
        sums = {
            "ce": metrics.ce_N.sum(),
            "forward_kl": metrics.forward_kl_N.sum(),
            "agreement": metrics.top1_agree_N.sum(),
        }
        return RowLoss(out.loss_sum, sums)

    def _target(
        self, parts: list[TokenTargets], row: PackedRow, device: torch.device
    ) -> SparseTarget:
        padded = pad_targets(parts)
        return SparseTarget(
            ids_NK=torch.from_numpy(padded.ids_NK).to(device),
            q_NK=torch.from_numpy(padded.q_NK).to(device),
            head_mask_NK=torch.from_numpy(padded.head_mask_NK).to(device),
            valid_NK=torch.from_numpy(padded.valid_NK).to(device),
            label_ids_N=torch.from_numpy(row.labels_N).to(device),
            label_logq_N=torch.from_numpy(padded.label_logq_N).to(device),
            teacher_entropy_N=torch.from_numpy(padded.teacher_entropy_N).to(device),
            temperature=self.temperature,
        )


def loss_spec(config: Distill, *, temperature: float) -> LossSpec:
    """The recipe's objective, at the temperature the targets were stored at.

    Raises RecipeError for a combination that cannot be.
    """
    natural = {"forward_kl": "unbiased", "policy_gradient": "sampled"}
    treatment = config.outside
    if treatment == "auto":
        treatment = natural.get(config.divergence, "bucket")
    terms = [
        Term(
            config.divergence, treatment, share=1 - config.reverse_share,  # type: ignore[arg-type]
            beta=config.beta, alpha=config.alpha,
        )
    ]  # fmt: skip
    if config.reverse_share:
        terms.append(Term("reverse_kl", "bucket", share=config.reverse_share))
    return LossSpec(tuple(terms), lam=config.lam, ce_on=config.ce_on, temperature=temperature)
