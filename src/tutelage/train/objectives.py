"""The two objectives of the loop: cross-entropy on labels, and distillation from stored targets.

Each picks the targets of a packed row and hands hidden states and head to `fused.fused_loss`; the
mathematics is in `losses.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tutelage.core.errors import RecipeError
from tutelage.models.load import BackboneAndHead
from tutelage.recipe.training import TeacherLoss
from tutelage.targets.batch import pad_targets
from tutelage.targets.schema import StoreMeta, TokenTargets
from tutelage.train.batches import PackedBatch
from tutelage.train.fused import fused_loss
from tutelage.train.loop import BatchLoss
from tutelage.train.losses import SparseTarget
from tutelage.train.spec import CROSS_ENTROPY, DEFAULT_TREATMENT, LossSpec, Term


class CrossEntropy:
    """SFT: mean negative log-probability of the labels, nats a token."""

    def __call__(self, hidden_ND: Tensor, head: BackboneAndHead, batch: PackedBatch) -> BatchLoss:
        """Summed over the row's targets."""
        labels_N = torch.from_numpy(batch.labels_N).to(hidden_ND.device)
        out = fused_loss(
            hidden_ND, head.weight_VD, SparseTarget.labels_only(labels_N), CROSS_ENTROPY,
            bias_V=head.bias_V, softcap=head.softcap,
        )  # fmt: skip
        return BatchLoss(out.loss_sum, {})


@dataclass(frozen=True)
class Distillation:
    """`(1 - lam) * CE + lam * KD` on the stored targets of the rows that were packed."""

    spec: LossSpec
    temperature: float
    """At which the teacher's probabilities were stored."""
    targets: Callable[[int], TokenTargets | None]
    """The targets of an example, of which its first are used, as many as were packed; None for
    text that the teacher wrote."""

    def __call__(self, hidden_ND: Tensor, head: BackboneAndHead, batch: PackedBatch) -> BatchLoss:
        """Summed over the row's targets, with the parts a person would ask for."""
        target = self._target(batch, hidden_ND.device)
        out = fused_loss(
            hidden_ND, head.weight_VD, target, self.spec, bias_V=head.bias_V, softcap=head.softcap
        )
        metrics, text_N = out.metrics, target.teacher_text_N
        count = len(hidden_ND)
        if text_N is None:
            cross_entropy, scored = (metrics.ce_N.sum(), count), count
        else:  # it counts where it is learnt
            cross_entropy, scored = (metrics.ce_N[text_N].sum(), text_N.sum()), (~text_N).sum()
        sums = {
            "ce": cross_entropy,
            "forward_kl": (metrics.forward_kl_N.sum(), scored),
            "agreement": (metrics.top1_agree_N.sum(), metrics.top1_known_N.sum()),
        }
        return BatchLoss(out.loss_sum, sums)

    def _target(self, batch: PackedBatch, device: torch.device) -> SparseTarget:
        stored = [self.targets(index) for index in batch.examples]
        tau = next((part.tau for part in stored if part is not None), None)
        padded = pad_targets(
            [
                TokenTargets.blank(count, tau) if part is None else part.first(count)
                for part, count in zip(stored, batch.counts, strict=True)
            ]
        )
        text_N = np.repeat([part is None for part in stored], batch.counts)
        return SparseTarget(
            ids_NK=torch.from_numpy(padded.ids_NK).to(device),
            q_NK=torch.from_numpy(padded.q_NK).to(device),
            head_mask_NK=torch.from_numpy(padded.head_mask_NK).to(device),
            valid_NK=torch.from_numpy(padded.valid_NK).to(device),
            label_ids_N=torch.from_numpy(batch.labels_N).to(device),
            label_logq_N=torch.from_numpy(padded.label_logq_N).to(device),
            teacher_entropy_N=torch.from_numpy(padded.teacher_entropy_N).to(device),
            temperature=self.temperature,
            teacher_text_N=(
                torch.from_numpy(text_N).to(device) if self.spec.ce_on == "teacher" else None
            ),
        )


def loss_spec(config: TeacherLoss, meta: StoreMeta) -> LossSpec:
    """The recipe's objective, at the temperature the targets were stored at.

    Targets without a sampled tail know nothing outside the head: their rest is one bucket.
    Raises RecipeError for a combination that cannot be.
    """
    treatment = config.outside
    if treatment == "auto":
        treatment = DEFAULT_TREATMENT[config.divergence]
        treatment = "bucket" if treatment == "unbiased" and not meta.has_tail else treatment
    if treatment == "unbiased" and not meta.has_tail:
        raise RecipeError(
            f"outside = unbiased, but the targets are of the estimator {meta.estimator}, which "
            "keeps nothing outside its head; set outside = bucket, or score with a threshold"
        )
    by_head = treatment != "unbiased" and config.divergence != "policy_gradient"
    if (by_head or config.reverse_share) and not meta.has_head:
        what = f"outside = {treatment}" if by_head else "reverse_share"
        raise RecipeError(
            f"{what} needs a head, and the targets are of the estimator "
            f"{meta.estimator}, which has none; set divergence = forward_kl and outside = unbiased"
        )
    if config.divergence == "policy_gradient" and not meta.has_label:
        raise RecipeError(
            f"policy_gradient needs the sampled token's own probability, which {meta.estimator} "
            "drops outside its head; take another divergence, or score again"
        )
    terms = [
        Term(
            config.divergence, treatment, share=1 - config.reverse_share,  # type: ignore[arg-type]
            beta=config.beta, alpha=config.alpha,
        )
    ]  # fmt: skip
    if config.reverse_share:
        terms.append(Term("reverse_kl", "bucket", share=config.reverse_share))
    return LossSpec(tuple(terms), lam=config.lam, ce_on=config.ce_on, temperature=meta.temperature)
