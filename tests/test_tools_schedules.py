import math

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.masking_rates import RatedRows, RatedSampler, check_rate_end
from hf_selfattn.tools.schedules import make_scheduler
from hf_selfattn.tools.training import EpochSampler

from .pretraining_runs import make_arguments, make_trainer, trained_weights
from .test_tools_collators import rows_of
from .test_tools_training import make_rows
from .train_scripts import tiny_tokenizer

WSD = {"lr_scheduler_type": "warmup_stable_decay"}


def wsd(done, warmup, decay, form):
    """The closed form, over shares of the training."""
    if done < warmup:
        return done / warmup
    if done < 1 - decay:
        return 1.0
    fallen = (done - (1 - decay)) / decay
    return {"1-sqrt": 1 - math.sqrt(fallen), "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[
        form
    ]


def optimizer():
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 0.1}])


def rates(scheduler, steps):
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("form", ["1-sqrt", "linear", "cosine"])
@pytest.mark.parametrize("lengths", [(10, 30), (0.1, 0.3), (0, 0.5)], ids=str)
def test_warmup_stable_decay_over_steps(lengths, form, tmp_path):
    warmup, decay = lengths
    arguments = make_arguments(tmp_path, **WSD, warmup_steps=warmup, decay_steps=decay, decay_type=form, max_steps=100)
    shares = [part / 100 if part >= 1 else part for part in lengths]
    expected = [wsd(step / 100, *shares, form) for step in range(100)]
    found = rates(make_scheduler(arguments, optimizer(), 100), 100)
    assert [one for one, _ in found] == pytest.approx(expected, abs=1e-9)
    assert [other for _, other in found] == pytest.approx([0.1 * rate for rate in expected], abs=1e-9)


@pytest.mark.parametrize("form", ["1-sqrt", "linear", "cosine"])
def test_warmup_stable_decay_over_a_budget(form, tmp_path):
    """Of steps of any size: the rate is that of the share of the budget that is used."""
    arguments = make_arguments(tmp_path, **WSD, warmup_steps=0.1, decay_steps=0.3, decay_type=form, max_tokens=1000)
    used = np.cumsum([0, *np.random.default_rng(0).integers(1, 60, 40)])
    now = iter(used[1:])
    share = [0.0]

    scheduler = make_scheduler(arguments, optimizer(), None, lambda: share[0])
    found = []
    for _ in used:
        found.append(scheduler.get_last_lr()[0])
        share[0] = next(now, 0) / 1000
        scheduler.optimizer.step()
        scheduler.step()
    expected = [wsd(done / 1000, 0.1, 0.3, form) if done < 1000 else 0 for done in used]
    assert used[-1] > 1000
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("linear", lambda share: 1 - (share - 0.2) / 0.8),
        ("cosine", lambda share: (1 + math.cos(math.pi * (share - 0.2) / 0.8)) / 2),
        ("constant_with_warmup", lambda share: 1.0),
    ],
)
def test_other_schedules_follow_a_budget_too(kind, rate, tmp_path):
    arguments = make_arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=0.2, max_minutes=3)
    share = [0.1]
    scheduler = make_scheduler(arguments, optimizer(), None, lambda: share[0])
    for share[0], expected in ((0.1, 0.5), (0.2, 1.0), (0.7, rate(0.7)), (1.0, rate(1.0))):
        scheduler.optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr()[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5, "max_minutes": 1.0}, "A training has one length, got --max_tokens 5 and --max_minutes 1.0"),
        ({"max_tokens": 5, "max_steps": 9}, "one length, got --max_tokens 5 and --max_steps 9"),
        ({"max_minutes": 5, "num_train_epochs": 2}, "one length, got --max_minutes 5 and --num_train_epochs 2"),
        ({"max_tokens": 0}, "--max_tokens must be above 0, got 0"),
        ({"max_minutes": float("inf")}, "--max_minutes must be above 0, got inf"),
        (WSD, "needs the length of the decay, got none. Pass --decay_steps"),
        ({"decay_steps": 0.1}, "--decay_steps 0.1 has no effect with --lr_scheduler_type linear"),
        ({**WSD, "decay_steps": -1}, "--decay_steps must be 0 or more, got -1"),
        ({**WSD, "decay_steps": 5, "lr_scheduler_kwargs": {"num_decay_steps": 3}}, "The decay is given once"),
        ({**WSD, "decay_steps": 0.6, "warmup_steps": 0.5}, "are shares of one training and make more than 1"),
        ({**WSD, "decay_steps": 5, "max_tokens": 9}, "so --decay_steps is a share of the budget, below 1; got 5"),
        ({"warmup_steps": 5, "max_minutes": 9}, "With --max_minutes .* so --warmup_steps is a share"),
        ({"lr_scheduler_type": "inverse_sqrt", "max_tokens": 9}, "inverse_sqrt does not. Use linear, cosine"),
        ({"logging_steps": 0.1, "max_tokens": 9}, "--logging_steps counts steps; got 0.1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_is_no_schedule_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **options)


def test_a_decay_longer_than_the_training_is_refused(tmp_path):
    """As soon as it is known: with --max_steps before anything is read, with epochs when they are counted."""
    message = r"of 100 steps has no room for 60 of warm-up .* and 50 of decay"
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **WSD, warmup_steps=60, decay_steps=50, max_steps=100)
    arguments = make_arguments(tmp_path, **WSD, warmup_steps=60, decay_steps=50, num_train_epochs=1)
    with pytest.raises(ValueError, match=message):
        make_scheduler(arguments, optimizer(), 100)


def test_no_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--max_steps is at least 1, got 0. .* --do_train false"):
        make_arguments(tmp_path, max_steps=0)


def falling(folder, **options):
    return make_arguments(folder, **{**WSD, "decay_steps": 0.5, "max_steps": 20, **options})


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_each_row_has_the_rate_of_its_step(processes, accumulation, tmp_path, monkeypatch):
    """Against a count over accelerate's own batches: 203 rows, 8 a batch."""
    rows = RatedRows(make_rows(203), 0.3, 0.1)
    arguments = falling(tmp_path, gradient_accumulation_steps=accumulation)
    monkeypatch.setattr(type(arguments), "world_size", processes)
    step = 0
    for epoch in range(3):
        rows.set_epoch(epoch)
        sampler = RatedSampler(EpochSampler(rows, 0), rows, arguments)
        batches = BatchSampler(sampler, batch_size=8, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, rank, even_batches=False)) for rank in range(processes)]
        first = step
        for number in range(len(shards[0])):
            step = first + number // accumulation
            expected = 0.3 - 0.2 * min(1, max(0, (step / 20 - 0.5) / 0.5))
            for shard in shards:
                for index in shard[number] if number < len(shard) else []:
                    assert index[0] == epoch
                    assert index[2] == pytest.approx(expected)
        step += 1


def test_the_rate_follows_tokens(tmp_path):
    """Packed rows in batches of 8: the tokens before each step are counted one by one."""
    trainer = make_trainer(tmp_path, packed=True, rate_end=0.1, per_device_train_batch_size=2,
                           **{**WSD, "decay_steps": 0.5, "max_tokens": 3000})  # fmt: skip
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda items: seen.append(items) or collate(items)
    trainer.train()
    tokens, shown = 0, set()
    for items in seen[: trainer.state.global_step]:
        expected = 0.3 - 0.2 * min(1, max(0, (tokens / 3000 - 0.5) / 0.5))
        documents = [document for row in items for document in row]
        assert [document["mlm_probability"] for document in documents] == pytest.approx([expected] * len(documents))
        shown.add(round(expected, 3))
        tokens += sum(len(document["input_ids"]) for document in documents)
    assert tokens == trainer.progress.totals["tokens"] >= 3000
    assert max(shown) == 0.3
    assert min(shown) < 0.15


def test_a_row_is_masked_at_its_rate():
    rows = [{**row, "mlm_probability": 0.1 if row["example_id"] % 2 else 0.6} for row in rows_of(400)]
    collate = MaskingCollator(tiny_tokenizer(), 0.3)
    labels = collate(rows)["labels"] != -100
    maskable = torch.tensor([len(row["input_ids"]) - 2 for row in rows])
    for start, rate in ((0, 0.6), (1, 0.1)):
        assert (labels[start::2].sum() / maskable[start::2].sum()).item() == pytest.approx(rate, abs=0.02)
    plain = [{name: value for name, value in row.items() if name != "mlm_probability"} for row in rows]
    same = [{**row, "mlm_probability": 0.3} for row in plain]
    assert torch.equal(collate(plain)["labels"], collate(same)["labels"])


@pytest.mark.parametrize("budget", [{"max_steps": 12}, {"num_train_epochs": 2.5}, {"max_tokens": 2000}], ids=str)
def test_a_falling_rate_with_workers_and_after_a_resumption(budget, tmp_path):
    options = {**WSD, "decay_steps": 0.5, "packed": True, "rate_end": 0.1, "per_device_train_batch_size": 2,
               "save_steps": 2, **budget}  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options, dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == whole.state.global_step > 6
    assert all(torch.equal(a, b) for a, b in zip(trained_weights(whole), trained_weights(resumed), strict=True))
    constant = make_trainer(tmp_path / "constant", **{**options, "rate_end": None})
    constant.train()
    assert not torch.equal(trained_weights(whole)[0], trained_weights(constant)[0])


@pytest.mark.parametrize(
    ("end", "options", "message"),
    [
        (0.0, {}, "--mlm_probability_end is above 0 and at most 1, got 0.0"),
        (0.1, {"lr_scheduler_type": "linear", "decay_steps": None}, "--lr_scheduler_type linear has none of its own"),
        (0.1, {"max_steps": -1, "max_minutes": 3}, "minutes are known when they have passed. Use --max_tokens"),
        (0.1, {"accelerator_config": {"split_batches": True}}, "Leave them out of --accelerator_config"),
    ],
)
def test_a_rate_that_cannot_be_known_is_refused(end, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_rate_end(end, falling(tmp_path, **options))


def test_a_stream_has_no_falling_rate(tmp_path):
    with pytest.raises(ValueError, match=r"a stream is read by data workers that do not. Use --streaming false"):
        check_rate_end(0.1, falling(tmp_path), streaming=True)
    check_rate_end(None, falling(tmp_path), streaming=True)
    check_rate_end(0.1, falling(tmp_path))
