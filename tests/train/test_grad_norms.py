"""The gradient norm of each objective over what the objectives share."""

import pytest
import torch
from accelerate import Accelerator
from builders import ABLATION_ROWS, ITC, Objectives, build_batch, build_task

from sycoca.objectives.captioning import CaptioningConfig
from sycoca.train.diagnosis.grad_norms import check_grad_norms, objective_grad_norms
from sycoca.train.task import PretrainTask
from sycoca.types import ConfigError

BOTH: Objectives = {"itc": ITC, "ic": CaptioningConfig(weight=2.0)}


def expected_norm(name: str) -> torch.Tensor:
    """By an ordinary backward pass of a task that has this one objective, over both encoders, which both objectives reach."""
    task = build_task(BOTH)
    loss = task.weights[name] * task.results(build_batch())[name][0]
    loss.backward()
    text = task.model.text
    assert text is not None
    reached = {"itc": 0, "ic": 0}
    grads = []
    for other in reached:
        twin = build_task(BOTH)
        twin.results(build_batch())[other][0].backward()
        grads.append({key for key, parameter in twin.named_parameters() if parameter.grad is not None})
    shared = grads[0] & grads[1]
    assert any(key.startswith("model.vision") for key in shared) and "model.text.embedding.weight" in shared
    assert not any("projection" in key or "decoder" in key or "logit_scale" in key for key in shared)
    return torch.cat([p.grad.flatten() for key, p in task.named_parameters() if key in shared and p.grad is not None]).norm()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_each_norm_is_that_of_the_objective_s_own_backward_pass(name: str, num_chunks: int):
    norms = objective_grad_norms(build_task(BOTH, num_chunks=num_chunks), build_batch())
    torch.testing.assert_close(norms[name], expected_norm(name), rtol=1e-4, atol=0)


def test_measuring_leaves_gradients_random_numbers_and_the_step_as_they_were():
    task = build_task(ABLATION_ROWS["tg_mim_random"])
    state = torch.get_rng_state()
    norms = objective_grad_norms(task, build_batch())
    assert norms.keys() == {"itc", "ic", "tg_mim"} and all(norm > 0 for norm in norms.values())
    assert torch.get_rng_state().equal(state) and int(task.step) == 0
    assert all(parameter.grad is None for parameter in task.parameters())


@pytest.mark.parametrize("task", [build_task({"itc": ITC}), torch.nn.Linear(2, 3)], ids=["one_objective", "another_task"])
def test_it_is_refused_where_there_is_nothing_to_compare(task: PretrainTask):
    check_grad_norms(0, task, Accelerator(cpu=True))
    with pytest.raises(ConfigError, match="not several objectives"):
        check_grad_norms(1, task, Accelerator(cpu=True))
