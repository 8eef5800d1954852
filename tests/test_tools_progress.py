import json
import sys
import time
import types
from collections import Counter

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hf_selfattn.tools.progress import BudgetProgressCallback, Progress
from hf_selfattn.tools.training import CheckedTrainer

from .pretraining_runs import ROW_LENGTH, make_trainer, trained_weights
from .train_scripts import tiny_tokenizer

NAMES = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "padding", "masked_accuracy", "minutes",
         "minutes_left")  # fmt: skip


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batches_of(trainer):
    """The batches that the training reads, as the collator hands them out."""
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda items: seen.append(collate(items)) or seen[-1]
    return seen


def counted(batches):
    return [int(batch["attention_mask"].sum()) for batch in batches]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_budget_of_tokens_ends_with_the_step_that_uses_it_up(packed, accumulation, tmp_path):
    trainer = make_trainer(tmp_path, packed=packed, max_tokens=2500, gradient_accumulation_steps=accumulation,
                           per_device_train_batch_size=3)  # fmt: skip
    seen = batches_of(trainer)
    trainer.train()
    per_epoch = -(-len(trainer.train_dataset) // 3)
    used, step, batch = 0, 0, 0
    expected = []
    while used < 2500:
        many = min(accumulation, per_epoch - batch % per_epoch)
        used += sum(counted(seen[batch : batch + many]))
        step, batch = step + 1, batch + many
        expected.append(used)
    assert [entry["tokens"] for entry in logs_of(trainer)] == expected
    assert trainer.state.global_step == trainer.state.max_steps == step
    assert trainer.state.epoch == pytest.approx(batch / per_epoch)


def test_the_learning_rate_is_that_of_the_tokens_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path, max_tokens=3000, lr_scheduler_type="warmup_stable_decay", warmup_steps=0.2,
                           decay_steps=0.4)  # fmt: skip
    seen = batches_of(trainer)
    trainer.train()
    used = 0
    for entry, tokens in zip(logs_of(trainer), counted(seen), strict=False):
        done = used / 3000
        rate = done / 0.2 if done < 0.2 else 1 - max(0, (done - 0.6) / 0.4) ** 0.5
        assert entry["learning_rate"] == pytest.approx(1e-2 * rate, abs=1e-10)
        used += tokens
    assert used >= 3000


def test_seconds_before_the_training_are_part_of_its_minutes(tmp_path):
    trainer = make_trainer(tmp_path, seconds_before=60.0, max_minutes=1, lr_scheduler_type="linear")
    trainer.train()
    (entry,) = logs_of(trainer)
    assert entry["minutes"] >= 1
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("budget", [{"max_steps": 5}, {"max_tokens": 2500}], ids=["steps", "tokens"])
def test_what_was_used_is_known_at_the_end_though_the_last_log_was_before(budget, tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=4, **budget)
    seen = batches_of(trainer)
    trainer.train()
    used = trainer.progress.used()
    assert used["tokens_used"] == sum(counted(seen[: trainer.state.global_step])) > logs_of(trainer)[-1]["tokens"]
    assert used["minutes"] == trainer.progress.seconds / 60 > 0
    assert trainer.progress.used() == used


def test_what_the_log_says(tmp_path):
    """Each number against a count by hand; without dropout an evaluation of the same batch finds the same tokens."""
    trainer = make_trainer(tmp_path, max_steps=6, logging_steps=2, per_device_train_batch_size=5)
    seen, right, compute_loss = batches_of(trainer), [], trainer.compute_loss

    def also_evaluated(model, inputs, *args, **kwargs):
        with torch.no_grad():
            model.eval()
            found = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits.argmax(-1)
            model.train()
        asked = inputs["labels"] != -100
        right.append(((found == inputs["labels"]) & asked).sum().item() / asked.sum().item())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = also_evaluated
    words = Counter(token for row in trainer.train_dataset for token in row["input_ids"][1:-1])
    with torch.no_grad():
        trainer.model.get_output_embeddings().bias[words.most_common(1)[0][0]] = 3.0  # is sometimes right, then
    trainer.flops_per_token, trainer.peak_flops = 1e6, 1e12
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 3
    before = 0.0
    for number, entry in enumerate(logs):
        assert set(NAMES) <= set(entry)
        pair = seen[2 * number : 2 * number + 2]
        tokens, places = sum(counted(pair)), sum(batch["input_ids"].numel() for batch in pair)
        assert entry["tokens"] == sum(counted(seen[: 2 * number + 2]))
        assert entry["padding"] == pytest.approx(1 - tokens / places, abs=1e-4)
        assert entry["masked_accuracy"] == pytest.approx(right[2 * number + 1], abs=1e-4)
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * 1e6 / 1e12, abs=1e-4)
        assert entry["tokens_per_second"] > 0
        assert entry["minutes"] >= before
        before = entry["minutes"]
    assert logs[-1]["minutes_left"] == 0
    assert sum(right) > 0


@pytest.mark.parametrize(
    "options", [{"packed": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"model_type": "bert"}], ids=str
)
def test_accuracy_of_packed_rows_of_accumulated_steps_and_of_stock_models(options, tmp_path):
    """Known at the beginning of the last micro-batch: weights that always say 7, and labels that are 7 or are not."""
    trainer = make_trainer(tmp_path, max_steps=2, **options)
    head = trainer.model.get_output_embeddings()
    with torch.no_grad():
        head.bias[7] = 1e6
    seen = batches_of(trainer)
    trainer.train()
    last = seen[:2] if "gradient_accumulation_steps" not in options else [seen[1], seen[3]]
    labels = [batch["labels"][batch["labels"] != -100] for batch in last]
    expected = [(asked == 7).float().mean().item() for asked in labels]
    assert [entry["masked_accuracy"] for entry in logs_of(trainer)] == pytest.approx(expected, abs=1e-4)


def test_the_log_changes_no_weight(tmp_path):
    """Counting predictions draws no random number and leaves nothing behind."""
    weights = []
    for steps in (1, 9):
        trainer = make_trainer(tmp_path / str(steps), max_steps=4, logging_steps=steps, hidden_dropout=0.2)
        trainer.train()
        weights.append(trained_weights(trainer))
        assert len(logs_of(trainer)) == 4 // steps
        assert not trainer.model.prediction_head._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_without_new_options_the_weights_are_those_of_the_plain_trainer(tmp_path):
    options = {"max_steps": 5, "warmup_steps": 2, "weight_decay": 0.1, "hidden_dropout": 0.2, "packed": True}
    ours = make_trainer(tmp_path / "ours", **options)
    ours.train()
    other = make_trainer(tmp_path / "other", **options)
    plain = CheckedTrainer(model=other.model, args=other.args, train_dataset=other.train_dataset,
                           data_collator=other.data_collator, processing_class=tiny_tokenizer())  # fmt: skip
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(trained_weights(ours), trained_weights(plain), strict=True))


class SlowClock:
    """A clock that goes on by `pace` seconds whenever somebody looks, and by more while something else is done."""

    def __init__(self, pace):
        self.now, self.pace = 0.0, pace

    def __call__(self):
        self.now += self.pace
        return self.now


class Absent(TrainerCallback):
    """Evaluation and saving that take an hour each."""

    def __init__(self, clock):
        self.clock = clock

    def on_evaluate(self, args, state, control, **kwargs):
        self.clock.now += 3600

    on_save = on_evaluate


def test_minutes_are_those_of_training_alone(tmp_path, monkeypatch):
    clock = SlowClock(10)
    monkeypatch.setattr(time, "perf_counter", clock)
    trainer = make_trainer(
        tmp_path, max_minutes=2, save_steps=3, lr_scheduler_type="linear", callbacks=[Absent(clock)]
    )
    trainer.train()
    logs = logs_of(trainer)
    # One look at each step, and one more after each of the saves.
    assert [entry["minutes"] for entry in logs] == pytest.approx([step / 6 for step in range(1, 13)], abs=1e-3)
    assert [entry["minutes_left"] for entry in logs] == pytest.approx(
        [2 - step / 6 for step in range(1, 13)], abs=1e-3
    )
    rates = [1e-2 * (1 - step / 12) for step in range(12)]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(rates, abs=1e-9)
    assert clock.now > 3600


def test_used_minutes_are_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", SlowClock(10))
    options = {"max_minutes": 2, "save_steps": 4, "lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert resumed.state.global_step == whole.state.global_step == 12
    assert [entry["minutes"] for entry in logs_of(resumed)] == [entry["minutes"] for entry in logs_of(whole)]
    assert all(torch.equal(a, b) for a, b in zip(trained_weights(whole), trained_weights(resumed), strict=True))


@pytest.mark.parametrize("restore_callbacks", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_budget_of_tokens_goes_on_bit_for_bit(workers, restore_callbacks, tmp_path):
    options = {"packed": True, "max_tokens": 2500, "save_steps": 3, "per_device_train_batch_size": 2,
               "warmup_steps": 0.1, "hidden_dropout": 0.1, "dataloader_num_workers": workers,
               "restore_callback_states_from_checkpoint": restore_callbacks}  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    saved = json.loads((tmp_path / "whole" / "checkpoint-9" / "trainer_state.json").read_text())
    used = saved["stateful_callbacks"]["Progress"]["attributes"]["totals"]["tokens"]
    assert used == logs_of(whole)[8]["tokens"]
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    assert resumed.state.global_step == whole.state.global_step > 9
    assert all(torch.equal(a, b) for a, b in zip(trained_weights(whole), trained_weights(resumed), strict=True))
    assert logs_of(resumed)[-1]["tokens"] == logs_of(whole)[-1]["tokens"]


def test_a_larger_budget_goes_on_at_its_own_rate(tmp_path):
    options = {"save_steps": 3, "lr_scheduler_type": "linear"}
    make_trainer(tmp_path / "short", max_tokens=1500, **options).train()
    longer = make_trainer(tmp_path / "longer", max_tokens=3000, **options)
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-3"))
    for before, entry in zip(logs_of(longer)[2:], logs_of(longer)[3:], strict=False):
        assert entry["learning_rate"] == pytest.approx(1e-2 * (1 - before["tokens"] / 3000), abs=1e-10)


def test_a_checkpoint_without_a_count_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_steps=2)
    trainer.train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["Progress"]
    trainer.state.global_step = 2
    trainer.state.stateful_callbacks = state["stateful_callbacks"]
    with pytest.raises(ValueError, match="of step 2 does not say how many tokens were used, so that --max_tokens"):
        Progress("tokens", 5).restore(trainer.state)
    Progress().restore(trainer.state)


def test_a_second_training_begins_anew(tmp_path):
    trainer = make_trainer(tmp_path, max_tokens=900)
    trainer.train()
    steps = trainer.state.global_step
    trainer.train()
    assert trainer.state.global_step == steps


def test_evaluations_and_checkpoints_at_shares_of_a_budget(tmp_path):
    trainer = make_trainer(tmp_path, max_tokens=3000, save_steps=0.25, eval_strategy="steps", eval_steps=0.5)
    trainer.train()
    tokens = [0, *(entry["tokens"] for entry in logs_of(trainer))]
    passed = {part: [step for step in range(1, len(tokens))
                     if tokens[step] * part // 3000 > tokens[step - 1] * part // 3000] for part in (2, 4)}  # fmt: skip
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == passed[2]
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == passed[4]


def test_the_bar_expects_the_steps_of_the_budget(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_tokens=2000, disable_tqdm=False)
    bar = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, BudgetProgressCallback))
    totals, estimate = [], bar._estimate
    monkeypatch.setattr(bar, "_estimate", lambda state: (estimate(state), totals.append(bar.training_bar.total)))
    trainer.train()
    assert totals[0] is None
    assert totals[1:] == [
        round(step / min(1, entry["tokens"] / 2000)) for step, entry in enumerate(logs_of(trainer), start=1)
    ]
    assert totals[-1] == trainer.state.global_step


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    """Through the stock callback, with a writer that remembers."""
    written = {}

    class Writer:
        def __init__(self, log_dir=None):
            self.log_dir = log_dir

        def add_scalar(self, tag, value, step):
            written.setdefault(tag, []).append((step, value))

        def add_text(self, *args):
            pass

        flush = close = add_text

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    trainer = make_trainer(tmp_path, max_steps=3, report_to=["tensorboard"])
    trainer.train()
    logs = logs_of(trainer)
    for name in NAMES:
        assert written[f"train/{name}"] == [(entry["step"], entry[name]) for entry in logs]


def test_packed_rows_are_counted_without_what_is_left_of_them(tmp_path):
    trainer = make_trainer(tmp_path, packed=True, max_steps=3, per_device_train_batch_size=2)
    trainer.train()
    assert all(0 <= entry["padding"] < 0.5 for entry in logs_of(trainer))
    assert logs_of(trainer)[-1]["tokens"] <= 3 * 2 * ROW_LENGTH


def test_a_run_whose_budget_is_used_up_trains_no_further_when_it_is_resumed(tmp_path):
    options = {"max_tokens": 1200, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    last = tmp_path / f"checkpoint-{whole.state.global_step}"
    again = make_trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == whole.state.global_step
    assert again.progress.totals["tokens"] == whole.progress.totals["tokens"]
    for a, b in zip(trained_weights(again), trained_weights(whole), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
