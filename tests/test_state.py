"""The state's form on disk: training goes on from it, bit for bit, and its hash misses nothing."""

import hashlib

import pytest
import torch
from torch import Tensor

from massl_ray.config import Config, load, resolve, validate
from massl_ray.method.memory import Memory, block_permutation
from massl_ray.method.network import build_encoder, drop_path_draws
from massl_ray.method.schedules import schedule_at
from massl_ray.method.step import Batch, MicroBatch, State, train_step
from massl_ray.training.collectives import Local
from massl_ray.training.state import build_state, from_tensors, state_sha256, step_settings, to_tensors
from tests.images import TINY

CPU = torch.device("cpu")
BACKBONES = ["test_vit", "test_resnet"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on busy cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(backbone: str, seed: int = 0) -> Config:
    return validate(
        {
            "run": {"seed": seed},
            "views": {"global_size": 32, "local_size": 16, "num_local": 1},
            "model": {"backbone": backbone, "drop_path": 0.2},
            "head": {"hidden_dim": 24, "dim": 8, "batch_norm": True},
            "memory": {"size": 20, "num_blocks": 2},
            "optim": {"lr": 0.05, "warmup_epochs": 0.0},
            "train": {"steps": 10, "global_batch_size": 6, "micro_batch_size": 3, "precision": "fp32"},
        }
    )


def fresh(settings: Config) -> State:
    return build_state(settings, resolve(settings, 60), CPU, Local())


def train(state: State, settings: Config, steps: int) -> State:
    """Steps on images that depend on the step only."""
    resolved = resolve(settings, 60)
    for _ in range(steps):
        random = torch.Generator().manual_seed(state.step)
        micro_batches = [
            MicroBatch(
                torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8, generator=random),
                torch.randint(0, 256, (3, 1, 16, 16, 3), dtype=torch.uint8, generator=random),
                drop_path_draws(state.student, settings.run.seed, state.step, index, 3, 3),
            )
            for index in range(2)
        ]
        permutation = block_permutation(settings.run.seed, state.step, 20, 10)
        schedule = schedule_at(state.step, settings, resolved)
        train_step(state, Batch(micro_batches, permutation, 2), schedule, step_settings(settings, resolved, CPU), Local())
    return state


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_start_is_a_pure_function_of_the_configuration(backbone):
    state, again = fresh(config(backbone)), fresh(config(backbone))
    assert differing(to_tensors(state), to_tensors(again)) == []
    assert {"memory/rows", "student/head.mlp.0.weight"} <= set(
        differing(to_tensors(state), to_tensors(fresh(config(backbone, seed=1))))
    )
    expected = build_encoder(config(backbone)).state_dict()
    for encoder in (state.student, state.teacher):
        assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(state.memory.rows, Memory(20, 8, seed=0).rows)
    assert (state.step, state.memory.pointer) == (0, 0)
    assert len(state.student.drop_paths) > 0 and len(state.teacher.drop_paths) == 0
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())
    assert not set(map(id, state.teacher.parameters())) & set(map(id, state.student.parameters()))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_restored_training_goes_on_bit_for_bit(backbone):
    settings = config(backbone)
    state = train(fresh(settings), settings, 2)
    stored = to_tensors(state)
    expected = to_tensors(train(state, settings, 2))
    assert len(differing(stored, expected)) > 20

    for other in (fresh(config(backbone, seed=1)), train(fresh(settings), settings, 3)):  # whatever was there before
        from_tensors(other, stored)
        assert differing(to_tensors(other), stored) == []
        assert (other.step, other.memory.pointer) == (2, 12)
        assert differing(to_tensors(train(other, settings, 2)), expected) == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_stored_tensors_are_neither_read_nor_written_by_later_training(backbone):
    settings = config(backbone)
    state = train(fresh(settings), settings, 1)
    stored = to_tensors(state)
    sha = state_sha256(stored)
    train(state, settings, 1)
    assert state_sha256(stored) == sha
    from_tensors(state, stored)
    train(state, settings, 1)
    assert state_sha256(stored) == sha


def test_stored_tensors_hold_everything_by_name():
    settings = config("test_resnet")
    state = train(fresh(settings), settings, 1)
    stored = to_tensors(state)
    names = [name for name, _ in state.student.named_parameters()]
    buffers = [name for name, _ in state.student.named_buffers()]
    expected = {f"{side}/{name}" for side in ("student", "teacher") for name in [*names, *buffers]}
    expected |= {f"optimizer/{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
    assert stored.keys() == expected | {"memory/rows", "memory/pointer", "step"}
    assert all(value.is_contiguous() and value.device == CPU and not value.requires_grad for value in stored.values())
    moment = stored["optimizer/head.mlp.0.weight/exp_avg"]
    assert torch.equal(moment, state.optimizer.state[state.student.head.mlp[0].weight]["exp_avg"])
    assert (stored["step"].item(), stored["memory/pointer"].item()) == (1, 6)


def test_a_state_of_another_shape_is_refused():
    stored = to_tensors(fresh(config("test_vit")))
    with pytest.raises(RuntimeError):
        from_tensors(fresh(config("test_resnet")), stored)
    del stored["memory/rows"]
    with pytest.raises(KeyError):
        from_tensors(fresh(config("test_vit")), stored)


def test_hash_changes_with_any_tensor():
    settings = config("test_vit")
    stored = to_tensors(train(fresh(settings), settings, 1))
    sha = state_sha256(stored)
    assert state_sha256(dict(reversed(stored.items()))) == sha
    seen = {sha}
    for name, value in stored.items():
        changed = value.clone()
        last_byte = changed.view(-1).view(torch.uint8)[-1:]
        last_byte ^= 1
        seen.add(state_sha256(stored | {name: changed}))
    assert len(seen) == len(stored) + 1


def test_hash_covers_names_types_and_shapes():
    zeros = torch.zeros(2, 3)
    variants = [{"a": zeros}, {"b": zeros}, {"a": zeros.int()}, {"a": zeros.view(3, 2)}, {"a": zeros, "b": zeros[:0]}]
    assert len({state_sha256(variant) for variant in variants}) == len(variants)


def test_hash_by_hand():
    expected = hashlib.sha256(b"a torch.int16 ()\n\x02\x01" + b"b torch.float32 (2,)\n\x00\x00\x80\x3f\x00\x00\x00\xc0").hexdigest()
    assert state_sha256({"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(258, dtype=torch.int16)}) == expected


def test_step_settings_say_what_the_configuration_says():
    settings = validate(
        {
            "data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
            "loss": {"student_temp": 0.2, "koleo_weight": 0.3},
            "optim": {"clip_norm": 7.0},
            "memory": {"size": 30, "num_blocks": 4},
        }
    )
    made = step_settings(settings, resolve(settings, 60), CPU)
    assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (made.block_size, made.student_temp, made.koleo_weight, made.clip_norm) == (7, 0.2, 0.3, 7.0)
    assert made.autocast is torch.bfloat16 and made.device == CPU
    assert step_settings(config("test_vit"), resolve(config("test_vit"), 60), CPU).autocast is None


@pytest.mark.slow
def test_compiled_backbones_compute_the_same():
    """train.compile changes how the backbone runs, not what a checkpoint holds or a step gives."""
    metrics, names = [], []
    for compiled in ("false", "true"):
        setting = load([*TINY, "--train.micro_batch_size", "8", "--train.compile", compiled])
        resolved = resolve(setting, 48)
        state = build_state(setting, resolved, torch.device("cpu"), Local())
        generator = torch.Generator().manual_seed(0)
        views = (torch.randint(0, 256, (8, 2, side, side, 3), dtype=torch.uint8, generator=generator) for side in (32, 16))
        micro = MicroBatch(*views, drop_path_draws(state.student, 0, 0, 0, 8, 4))  # type: ignore[misc]
        batch = Batch([micro], torch.arange(64), 1)
        settings = step_settings(setting, resolved, torch.device("cpu"))
        metrics.append(train_step(state, batch, schedule_at(1, setting, resolved), settings, Local()))
        names.append(sorted(to_tensors(state)))
    torch.testing.assert_close(metrics[1], metrics[0], rtol=1e-4, atol=1e-4)
    assert names[0] == names[1]
