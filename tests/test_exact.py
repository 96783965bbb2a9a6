"""Parts of `bench exact` that need no Ray."""

import pytest

from massl_ray.benches.exact import _step, final_hash, flags
from massl_ray.config import load
from massl_ray.training.checkpoint import write_checkpoint
from massl_ray.training.collectives import Local
from massl_ray.training.state import build_state, state_sha256, to_tensors
from tests.helpers import tiny_run


def test_flags_are_those_of_a_run(tmp_path):
    config = load(flags(tmp_path / "run", (1, 2), **{"elastic.exact": "false"}))
    assert (config.elastic.min_workers, config.elastic.max_workers, config.elastic.exact) == (1, 2, False)
    assert config.train.steps == 60 and config.model.drop_path > 0 and config.run.dir == str(tmp_path / "run")


@pytest.mark.parametrize(("line", "step"), [("step 23/60  epoch 0.5  loss 4.1", 23), ("Workers   1 on cpu", 0), ("", 0)])
def test_steps_are_read_off_the_console(line, step):
    assert _step(line) == step


def test_a_hash_counts_only_after_the_last_step(tiny_images, tmp_path):
    import torch

    run = tiny_run(tiny_images, tmp_path / "run", "--train.steps", "4")
    state = build_state(run.config, run.resolved, torch.device("cpu"), Local())
    state.step = 3
    write_checkpoint(run.checkpoints, to_tensors(state), {}, keep=2)
    with pytest.raises(RuntimeError, match="ended with step_3, not after 4 steps"):
        final_hash(run)
    state.step = 4
    write_checkpoint(run.checkpoints, to_tensors(state), {}, keep=2)
    assert final_hash(run) == state_sha256(to_tensors(state))
