"""The loss against the memory, as two attention reads instead of a similarity matrix.

Letters: V views (0 and 1 are the global crops), B images, K memory slots, S slots a block, D embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from massl_ray.method.attention import read_blocks


@dataclass(frozen=True)
class ReadoutLoss:
    """All values are means over pairs, blocks and images; entropies in nats. Only `loss` carries a gradient."""

    loss: Tensor
    """Cross-entropy from the teacher's distribution over the slots of a block to the student's; ln S for a uniform student."""
    teacher_entropy: Tensor
    """Entropy of the teacher's distributions: between 0 and ln S."""
    student_entropy: Tensor
    """Entropy of the student's distributions."""
    kl: Tensor
    """loss - teacher_entropy: what the student can still learn."""
    agreement: Tensor
    """Cosine similarity of the two embeddings of a pair."""


def readout_loss(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    permutation: Tensor,
    *,
    num_views: int,
    block_size: int,
    student_temp: float,
    teacher_temp: float,
) -> ReadoutLoss:
    """Mean cross-entropy over the pairs (student view i, teacher view j), i != j, over blocks and images.

    With z a student row, t a teacher row, M_b the memory rows of block b, and both reads of the block

        c_b = softmax(t M_b' / tau_t) M_b        r_b = softmax(z M_b' / tau_s) M_b

    one pair's term and its gradient are

        L = logsumexp(z M_b' / tau_s) - <z, c_b> / tau_s        dL/dz = (r_b - c_b) / tau_s

    so the working memory is O(rows x D + rows x tile), never rows x K, and nothing of size K is kept for backward.

    Args:
        student: (V*B, D) unit rows, view-major: rows 0..B-1 are view 0, then view 1, ...
        teacher: (2*B, D) unit rows of the two global views, view-major. Gets no gradient.
        memory: (K, D) rows as they were before this batch.
        permutation: (K // S * S,) int64, slots in block order; block b is permutation[b*S:(b+1)*S]. A slot may be in several
            blocks.
        num_views: V, at least 2.
        block_size: S.
        student_temp, teacher_temp: temperatures tau_s and tau_t.

    Returns:
        ReadoutLoss of scalars in fp32, or float64 where the student is.

    Raises:
        ValueError: shapes that do not fit together.

    Source: the algebra of "The same loss without the similarity matrix" in docs/method.md, for the loss of
    Silva, Pedrini and Ramirez Rivera, ICML 2024 (arXiv 2407.17486).
    """
    _check(student, teacher, memory, permutation, num_views, block_size)
    loss, details = _Readout.apply(student, teacher, memory, permutation, num_views, block_size, student_temp, teacher_temp)  # type: ignore[misc]
    teacher_entropy, student_entropy, agreement = details.unbind()
    return ReadoutLoss(loss, teacher_entropy, student_entropy, loss.detach() - teacher_entropy, agreement)


class _Readout(torch.autograd.Function):
    """The gradient is known when the loss is, so backward only scales it."""

    @staticmethod
    def forward(ctx, student, teacher, memory, permutation, num_views, block_size, student_temp, teacher_temp):
        loss, grad, details = _evaluate(student, teacher, memory, permutation, num_views, block_size, student_temp, teacher_temp)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(details)
        return loss, details

    @staticmethod
    def backward(ctx, *upstream):
        (grad,) = ctx.saved_tensors
        return grad * upstream[0].to(grad.dtype), None, None, None, None, None, None, None


def _evaluate(student, teacher, memory, permutation, num_views, block_size, student_temp, teacher_temp):
    """Loss, its gradient in `student` (V*B, D), and (teacher entropy, student entropy, agreement)."""
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    z, t = student.detach().to(precise), teacher.detach().to(precise)
    rows, dim = z.shape
    batch, num_blocks = rows // num_views, len(permutation) // block_size

    queries = [(z, student_temp), (t, teacher_temp)]
    reads = read_blocks(queries, memory, permutation.view(num_blocks, block_size))  # summed over blocks
    (log_sum_student, read_student), (log_sum_teacher, read_teacher) = reads

    # Each student row meets the teacher rows of the other views of its image: one for a global view, two for a local one.
    first, second = read_teacher.split(batch)
    targets = (first + second).repeat(num_views, 1)
    targets[:batch], targets[batch : 2 * batch] = second, first
    partners = torch.full((rows, 1), 2.0, dtype=precise, device=z.device)
    partners[: 2 * batch] = 1.0

    scale = 1.0 / (2 * (num_views - 1) * num_blocks * batch)
    grad = (partners * read_student - targets) * (scale / student_temp)
    loss = scale * (torch.dot(partners.squeeze(1), log_sum_student) - (z * targets).sum() / student_temp)

    teacher_entropy = (log_sum_teacher.sum() - (t * read_teacher).sum() / teacher_temp) / (num_blocks * 2 * batch)
    student_entropy = (log_sum_student.sum() - (z * read_student).sum() / student_temp) / (num_blocks * rows)
    views, teachers = z.view(num_views, batch, dim), t.view(2, batch, dim)
    same_view = (views[:2] * teachers).sum()
    agreement = ((views.sum(0) * teachers.sum(0)).sum() - same_view) / (2 * (num_views - 1) * batch)
    return loss, grad.to(student.dtype), torch.stack([teacher_entropy, student_entropy, agreement])


def _check(student: Tensor, teacher: Tensor, memory: Tensor, permutation: Tensor, num_views: int, block_size: int) -> None:
    rows = student.shape[0]
    if num_views < 2 or rows % num_views:
        raise ValueError(f"student has {rows} rows, which is no multiple of num_views {num_views} (at least 2)")
    if teacher.shape != (2 * (rows // num_views), student.shape[1]):
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)}; the student's {tuple(student.shape)} asks for "
            f"{(2 * (rows // num_views), student.shape[1])}"
        )
    if memory.shape[1] != student.shape[1]:
        raise ValueError(f"memory rows are {memory.shape[1]} wide, embeddings {student.shape[1]}")
    if not len(permutation) or len(permutation) % block_size or block_size > len(memory):
        raise ValueError(
            f"permutation has {len(permutation)} slots: it must be a positive multiple of block_size "
            f"{block_size}, which is at most {len(memory)}"
        )
