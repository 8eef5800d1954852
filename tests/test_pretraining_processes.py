"""Pretraining in two processes: optimizers, budgets and the log are those of one. All in one pair of processes."""

import time

import pytest
import torch
from accelerate.utils import gather
from datasets import Dataset
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_selfattn.tools.neighbour_vectors import init_token_vectors
from hf_selfattn.tools.optimizers import hidden_matrices

from .pretraining_runs import make_trainer, trained_weights
from .processes import together
from .test_tools_optimizers import make_model, make_optimizer, set_gradients

TRAINING = {"max_steps": 5, "max_grad_norm": 0.5, "save_strategy": "no", "train_sampling_strategy": "random"}
CASES = {
    "muon": {**TRAINING, "optimizer": "muon", "learning_rate": 1e-3},
    "tokens": {**TRAINING, "max_steps": -1, "max_tokens": 2000, "warmup_steps": 0.2},
    "minutes": {**TRAINING, "max_steps": -1, "max_minutes": 0.5, "warmup_steps": 0.2},
    "rates": {**TRAINING, "max_steps": 8, "lr_scheduler_type": "warmup_stable_decay", "decay_steps": 0.5,
              "rate_end": 0.1},
}  # fmt: skip


def train(case, folder):
    """What each process ended with, and the log of the first. Minutes are those of a clock of its own pace."""
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    case = {"per_device_train_batch_size": 8 // size, **case}
    now, clock = [0.0], time.perf_counter
    if case.get("max_minutes"):

        def tick():
            now[0] += 1.5 + rank
            return now[0]

        time.perf_counter = tick
    try:
        trainer = make_trainer(folder / str(size), **case)
        trainer.train()
    finally:
        time.perf_counter = clock
    sums = [parameter.double().sum().item() for parameter in trained_weights(trainer)]
    ends = [trainer.state.global_step, trainer.progress.totals["tokens"], trainer.progress.seconds]
    ends += [trainer.lr_scheduler.get_last_lr()[0], *sums]
    both = trainer.accelerator.gather(torch.tensor([ends], dtype=torch.float64)).tolist()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"ends": both, "logs": logs}


def step_with_shards(folder):
    """For each weight the relative distance between an update of its shards and one of it as a whole."""
    whole, sharded = make_model(), make_model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    optimizers = [make_optimizer(model, weight_decay=0.0) for model in (whole, sharded)]
    set_gradients(whole, 0)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in sharded.named_parameters():
        assert type(parameter).__name__ == "DTensor"
        parameter.grad = distributed.tensor.distribute_tensor(gradients[name], mesh, parameter.placements)
    for optimizer in optimizers:
        optimizer.step()
    far = {}
    for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        update = one.detach() - before[name]
        far[name] = ((other.full_tensor().detach() - one.detach()).norm() / update.norm()).item()
    return far


def vectors_of_neighbours(folder):
    """Of each process: the seconds that it took for them, and how long its new token vectors are together."""
    model = make_model()
    rows = Dataset.from_dict({"input_ids": [torch.randint(43, (400,)).tolist()]})  # other rows in each
    seconds = init_token_vectors(model, rows, 0.1)
    found = [seconds, model.get_input_embeddings().weight.detach().double().sum().item()]
    return gather(torch.tensor([found], dtype=torch.float64)).tolist()


def run(name, folder):
    others = {"shards": step_with_shards, "neighbours": vectors_of_neighbours}
    return others[name](folder) if name in others else train(CASES[name], folder / name)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    names = [*CASES, "shards", "neighbours"]
    return dict(zip(names, together(run, names, tmp_path_factory.mktemp("together")), strict=True))


def column(answer, name):
    return [entry[name] for entry in answer["logs"]]


@pytest.mark.parametrize("name", CASES)
def test_both_processes_end_alike(answers, name):
    one, other = answers[name]["ends"]
    own_clock = 2  # each counts its seconds by itself where nothing depends on them
    assert one[:own_clock] + one[own_clock + 1 :] == other[:own_clock] + other[own_clock + 1 :]
    if name == "minutes":
        assert one[own_clock] == other[own_clock] >= 30


@pytest.mark.parametrize(("name", "tolerance"), [("muon", 1e-3), ("tokens", 1e-4), ("rates", 1e-4)])
def test_two_processes_train_as_one(answers, name, tolerance, tmp_path):
    """Muon's bf16 makes more of a rounded gradient than AdamW does."""
    alone, both = train(CASES[name], tmp_path), answers[name]
    assert column(both, "loss") == pytest.approx(column(alone, "loss"), rel=tolerance)
    for exact in ("learning_rate", "tokens"):
        assert column(both, exact) == column(alone, exact)
    asked = {len(column(answer, "masked_accuracy")) for answer in (alone, both)}
    assert asked == {len(both["logs"])}


def test_minutes_are_those_of_the_first_process(answers, tmp_path):
    """Its clock steps 1.5 seconds at a time, the other's 2.5."""
    alone = train(CASES["minutes"], tmp_path)
    assert alone["ends"][0][:4] == pytest.approx(answers["minutes"]["ends"][0][:4], rel=1e-6)
    assert column(answers["minutes"], "learning_rate") == pytest.approx(column(alone, "learning_rate"), rel=1e-6)


def test_neighbours_are_counted_once_for_all(answers):
    """Seconds of their own would be learning rates of their own."""
    one, other = answers["neighbours"]
    assert one == other
    assert one[0] > 0


def test_shards_get_the_updates_of_whole_matrices(answers):
    """In bf16 each of the two is 2 % from the exact update."""
    matrices = hidden_matrices(make_model())
    for name, distance in answers["shards"].items():
        assert distance < (0.05 if name in matrices else 1e-5), name
