"""The read-out against the golden vectors, against the plain formula through autograd in float64, and at its edges."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from massl_ray.method import attention
from massl_ray.method.readout import readout_loss

GOLDEN = sorted((Path(__file__).parent / "golden").glob("readout_*.npz"))


def plain_loss(
    student: Tensor, teacher: Tensor, memory: Tensor, permutation: Tensor, num_views, block_size, student_temp, teacher_temp
):
    """The definition: every pair, every block, a similarity matrix, a softmax and a log-softmax."""
    students, teachers = student.chunk(num_views), teacher.chunk(2)
    terms = []
    for slots in permutation.split(block_size):
        for i, z in enumerate(students):
            for j, t in enumerate(teachers):
                if i != j:
                    target = torch.softmax(t @ memory[slots].T / teacher_temp, dim=1)
                    terms.append(-(target * torch.log_softmax(z @ memory[slots].T / student_temp, dim=1)).sum(1))
    return torch.cat(terms).mean()


def plain_entropy(queries: Tensor, memory: Tensor, permutation: Tensor, block_size: int, temp: float) -> Tensor:
    terms = []
    for slots in permutation.split(block_size):
        logp = torch.log_softmax(queries @ memory[slots].T / temp, dim=1)
        terms.append(-(logp.exp() * logp).sum(1))
    return torch.cat(terms).mean()


def draw(num_views: int, batch: int, size: int, block: int, dim: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    student = normalize(torch.randn(num_views * batch, dim, generator=generator, dtype=torch.float64), dim=1)
    teacher = normalize(torch.randn(2 * batch, dim, generator=generator, dtype=torch.float64), dim=1)
    memory = normalize(torch.randn(size, dim, generator=generator, dtype=torch.float64), dim=1)
    permutation = torch.randperm(size, generator=generator)[: size // block * block]
    return student, teacher, memory, permutation


def value_and_grad(student: Tensor, *arguments, **options):
    student = student.clone().requires_grad_()
    result = readout_loss(student, *arguments, **options)
    (grad,) = torch.autograd.grad(result.loss, student)
    return result, grad


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path):
    golden = np.load(path)
    options = {key: float(golden[key]) for key in ("student_temp", "teacher_temp")}
    options |= {key: int(golden[key]) for key in ("num_views", "block_size")}
    inputs = (torch.from_numpy(golden[key]) for key in ("student", "teacher", "memory_before", "permutation"))
    result, grad = value_and_grad(*inputs, **options)
    assert result.loss.item() == pytest.approx(float(golden["loss"]), rel=1e-10)
    error = np.linalg.norm(grad.numpy() - golden["grad_student"]) / np.linalg.norm(golden["grad_student"])
    assert error < 1e-10


def test_golden_files_are_here():
    assert [path.stem for path in GOLDEN] == ["readout_paper_views", "readout_remainder", "readout_small", "readout_two_views"]


@settings(max_examples=40, deadline=None)
@given(
    num_views=st.integers(2, 6),
    batch=st.integers(1, 5),
    blocks=st.integers(1, 4),
    block=st.integers(1, 40),
    remainder=st.integers(0, 39),
    tile=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_equals_the_plain_formula(num_views, batch, blocks, block, remainder, tile, seed):
    """Loss and gradient for any views, batch, memory and block, S dividing K or not, tiles of any size."""
    size = blocks * block + remainder % block
    student, teacher, memory, permutation = draw(num_views, batch, size, block, 8, seed)
    options = {"num_views": num_views, "block_size": block, "student_temp": 0.1, "teacher_temp": 0.04}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", tile)
        result, grad = value_and_grad(student, teacher, memory, permutation, **options)
    reference_input = student.clone().requires_grad_()
    reference = plain_loss(reference_input, teacher, memory, permutation, num_views, block, 0.1, 0.04)
    (reference_grad,) = torch.autograd.grad(reference, reference_input)
    torch.testing.assert_close(result.loss, reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, reference_grad, rtol=1e-9, atol=1e-11)


def test_entropies_kl_and_agreement():
    student, teacher, memory, permutation = draw(5, 3, 48, 16, 8, seed=1)
    result = readout_loss(student, teacher, memory, permutation, num_views=5, block_size=16, student_temp=0.1, teacher_temp=0.05)
    teacher_entropy = plain_entropy(teacher, memory, permutation, 16, 0.05)
    torch.testing.assert_close(result.teacher_entropy, teacher_entropy, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.student_entropy, plain_entropy(student, memory, permutation, 16, 0.1), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.kl, result.loss - teacher_entropy, rtol=1e-10, atol=0)
    cosines = [(z * t).sum(1) for i, z in enumerate(student.chunk(5)) for j, t in enumerate(teacher.chunk(2)) if i != j]
    torch.testing.assert_close(result.agreement, torch.cat(cosines).mean(), rtol=1e-10, atol=0)


def test_order_within_a_block_does_not_matter():
    student, teacher, memory, permutation = draw(4, 3, 60, 20, 8, seed=2)
    options = {"num_views": 4, "block_size": 20, "student_temp": 0.1, "teacher_temp": 0.04}
    _, grad = value_and_grad(student, teacher, memory, permutation, **options)
    shuffled = torch.cat([block[torch.randperm(20, generator=torch.Generator().manual_seed(3))] for block in permutation.split(20)])
    _, again = value_and_grad(student, teacher, memory, shuffled, **options)
    torch.testing.assert_close(again, grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("teacher_temp", [0.02, 0.04, 0.07])
@pytest.mark.parametrize(("dtype", "loss_bound", "grad_bound"), [(torch.float32, 2e-6, 1e-5), (torch.bfloat16, 5e-3, 3e-2)])
def test_precision(dtype, loss_bound, grad_bound, teacher_temp):
    """fp32 and bf16 embeddings stay within stated bounds of float64 on the unrounded ones."""
    student, teacher, memory, permutation = draw(6, 8, 4096, 1024, 64, seed=4)
    options = {"num_views": 6, "block_size": 1024, "student_temp": 0.1, "teacher_temp": teacher_temp}
    reference, reference_grad = value_and_grad(student, teacher, memory, permutation, **options)
    result, grad = value_and_grad(student.to(dtype), teacher.to(dtype), memory.float(), permutation, **options)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(reference.loss.item(), rel=loss_bound)
    assert (grad.double() - reference_grad).norm() / reference_grad.norm() < grad_bound


@pytest.mark.parametrize("case", ["identical", "zero_memory", "huge"])
def test_no_nan(case):
    student, teacher, memory, permutation = (
        value.float() if value.is_floating_point() else value for value in draw(4, 3, 64, 32, 8, 5)
    )
    if case == "identical":
        student, teacher, memory = student[:1].expand(12, 8), student[:1].expand(6, 8), student[:1].expand(64, 8)
    elif case == "zero_memory":
        memory = torch.zeros_like(memory)
    else:
        student, teacher, memory = student * 1e4, teacher * 1e4, memory * 1e4
    result, grad = value_and_grad(
        student, teacher, memory, permutation, num_views=4, block_size=32, student_temp=0.1, teacher_temp=0.02
    )
    assert math.isfinite(result.loss.item()) and grad.isfinite().all()
    if case != "huge":  # nothing can be told apart: the loss is ln S
        assert result.loss.item() == pytest.approx(math.log(32), rel=1e-6)


def test_gradient_scales_with_what_comes_after():
    student, teacher, memory, permutation = draw(3, 2, 16, 8, 4, seed=6)
    options = {"num_views": 3, "block_size": 8, "student_temp": 0.1, "teacher_temp": 0.04}
    _, grad = value_and_grad(student, teacher, memory, permutation, **options)
    student.requires_grad_()
    (readout_loss(student, teacher, memory, permutation, **options).loss * -2.5).backward()
    torch.testing.assert_close(student.grad, grad * -2.5)


def test_nothing_is_kept_for_backward_but_the_gradient():
    """Saved for backward: one tensor as large as the student's embeddings, nothing of the memory's size."""
    student, teacher, memory, permutation = draw(3, 2, 4096, 1024, 4, seed=6)
    student.requires_grad_()
    saved: list[int] = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        readout_loss(student, teacher, memory, permutation, num_views=3, block_size=1024, student_temp=0.1, teacher_temp=0.04)
    assert saved == [student.numel()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 4}, "no multiple of num_views 4"),
        ({"block_size": 7}, "multiple of block_size 7"),
        ({"teacher": torch.zeros(3, 4)}, "teacher has shape"),
        ({"memory": torch.zeros(16, 5)}, "memory rows are 5 wide"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    student, teacher, memory, permutation = draw(3, 2, 16, 8, 4, seed=7)
    arguments = {
        "student": student,
        "teacher": teacher,
        "memory": memory,
        "permutation": permutation,
        "num_views": 3,
        "block_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        readout_loss(**(arguments | change), student_temp=0.1, teacher_temp=0.04)
