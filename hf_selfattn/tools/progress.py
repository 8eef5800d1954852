"""How far a training is, in steps, tokens or minutes, and what its log says of each interval."""

import math
import time

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

COUNTS = ("tokens", "places", "correct", "asked")


class Progress(TrainerCallback, ExportableState):
    """Counts a training's tokens and minutes, ends it when its budget is used, and is saved with each checkpoint.

    Tokens are real ones, special tokens included, of all processes. Minutes are those of training, on the clock of the
    first process; evaluation and saving are left out, so that how often they are done does not change a result. The
    budget is looked at after each optimizer step, and the step that goes beyond it is the last. In several processes
    all have the same numbers when a learning rate is made of them.

    Args:
        unit: of the budget: "tokens", "minutes", or "steps" (the Trainer's own `max_steps`).
        limit: the budget; None for steps.
        replicas: processes that read the same batch (tensor and sequence parallelism).
        seconds_before: in which the model learned before its training began.
    """

    def __init__(self, unit="steps", limit=None, replicas=1, seconds_before=0.0):
        self.unit, self.limit, self.replicas = unit, limit, replicas
        self.totals = dict.fromkeys(COUNTS, 0)
        self.seconds = self.seconds_before = seconds_before
        self.pending = None
        self.clock = self.share_before = self.of_session = self.first_step = None
        self.of_interval = (dict(self.totals), 0.0)

    def state(self):
        numbers = {"totals": self.totals, "seconds": self.seconds}
        return {"args": {"unit": self.unit, "limit": self.limit, "replicas": self.replicas}, "attributes": numbers}

    def share(self, state=None):
        """The part of the training that is done; for a budget of steps, of the Trainer's `state`."""
        if self.unit == "steps":
            return state.global_step / state.max_steps
        return self.totals["tokens"] / self.limit if self.unit == "tokens" else self.seconds / 60 / self.limit

    def count(self, inputs):
        """Adds a micro-batch of this process; nothing is waited for."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = mask.sum() if mask is not None and mask.ndim == 2 else torch.tensor(ids.numel(), device=ids.device)
        self._add(real, torch.full_like(real, ids.numel()), torch.zeros_like(real), torch.zeros_like(real))

    def count_correct(self, correct, asked):
        """Adds a micro-batch's right predictions of masked tokens, and their number."""
        asked = torch.full_like(correct, asked)
        self._add(torch.zeros_like(asked), torch.zeros_like(asked), correct, asked)

    def _add(self, *numbers):
        numbers = torch.stack(numbers).to(PartialState().device, torch.int64)
        self.pending = numbers if self.pending is None else self.pending + numbers

    def gather(self):
        """Brings the totals of all processes up to date; called by all of them."""
        pending, self.pending = self.pending, None
        if pending is None:
            pending = torch.zeros(len(COUNTS), dtype=torch.int64, device=PartialState().device)
        sums = reduce(pending, reduction="sum").tolist()
        for name, number in zip(COUNTS, sums, strict=True):
            self.totals[name] += number // self.replicas

    def used(self):
        """{"tokens_used", "minutes"} of the training so far; called by all processes."""
        self.gather()
        return {"tokens_used": self.totals["tokens"], "minutes": self.seconds / 60}

    def restore(self, state):
        """Goes on from the Trainer's `state`, where it is one of a checkpoint, else from nothing.

        Raises:
            ValueError: for a checkpoint of another Trainer, that does not say what was used of a budget.
        """
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is None and state.global_step and self.unit != "steps":
            raise ValueError(
                f"The checkpoint of step {state.global_step} does not say how many {self.unit} were used, so that "
                f"--max_{self.unit} cannot go on from it. Start anew from its weights with --model_name_or_path, or "
                "go on with --max_steps."
            )
        saved = Progress(seconds_before=self.seconds_before).state() if saved is None else saved
        self.totals, self.seconds = dict(saved["attributes"]["totals"]), saved["attributes"]["seconds"]
        state.stateful_callbacks[type(self).__name__] = self.state()
        self.pending = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.of_session, self.first_step = (self.share(state), self.seconds), state.global_step
        self.share_before = self.share(state)
        self.of_interval = (dict(self.totals), self.seconds)
        self.clock = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Between the optimizer's step and the scheduler's."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if self.unit == "tokens":
            self.gather()
        if self.unit == "minutes" and PartialState().use_distributed:
            # As whole microseconds: not every accelerator has float64.
            micros = torch.tensor([round(self.seconds * 1e6)], dtype=torch.int64, device=PartialState().device)
            self.seconds = broadcast(micros).item() / 1e6
        if self.unit != "steps" and self.share() >= 1:
            state.max_steps = state.global_step + 1  # the step that ends now is the last, as the Trainer ends it

    def on_step_end(self, args, state, control, **kwargs):
        before, self.share_before = self.share_before, self.share(state)
        if self.unit != "steps" and self.share() < 1:
            control.should_evaluate |= args.eval_strategy == "steps" and self._passed(args.eval_steps, before)
            control.should_save |= args.save_strategy == "steps" and self._passed(args.save_steps, before)
        if self.unit != "tokens" and (control.should_log or control.should_save):
            self.gather()

    def _passed(self, part, before):
        """Whether this step went beyond a multiple of a share of the budget."""
        return part is not None and part < 1 and math.floor(before / part) < math.floor(self.share_before / part)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.unit != "tokens" and (control.should_log or control.should_save):
            self.gather()

    def on_evaluate(self, args, state, control, **kwargs):
        self.clock = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.clock = time.perf_counter()

    def interval(self, state, flops_per_token=None, peak_flops=None):
        """What the log says of the steps since it was last asked.

        `tokens` so far; `tokens_per_second` (real ones, all processes); `padding`, its share of all places of the
        batches; `masked_accuracy`, where predictions were counted; `mfu`, the share of the devices' peak that the
        model's own arithmetic makes up (model FLOPs utilisation: Chowdhery et al. 2022, arXiv:2204.02311, appendix B),
        where the peak is known; `minutes` of training so far, and `minutes_left`.

        Args:
            flops_per_token: of a training step.
            peak_flops: FLOP/s of all devices together, or None.
        """
        (totals, seconds), self.of_interval = self.of_interval, (dict(self.totals), self.seconds)
        tokens, places, correct, asked = (self.totals[name] - totals[name] for name in COUNTS)
        speed = tokens / max(self.seconds - seconds, 1e-9)
        found = {"tokens": self.totals["tokens"], "tokens_per_second": round(speed, 1)}
        found["padding"] = round(1 - tokens / places, 4) if places else 0.0
        if asked:
            found["masked_accuracy"] = round(correct / asked, 4)
        if flops_per_token and peak_flops:
            found["mfu"] = round(speed * flops_per_token / peak_flops, 4)
        found["minutes"] = round(self.seconds / 60, 3)
        share, (first_share, first_seconds) = self.share(state), self.of_session
        done = share - first_share
        left = (1 - share) / done * (self.seconds - first_seconds) / 60 if done > 0 else None
        left = self.limit - self.seconds / 60 if self.unit == "minutes" else left
        if left is not None:
            found["minutes_left"] = round(max(0.0, left), 3)
        return found


class BudgetProgressCallback(ProgressCallback):
    """The stock progress bar, whose number of steps is the one that the budget lets expect.

    Args:
        share: function that gives the share of the budget that is used.
    """

    def __init__(self, share, **kwargs):
        super().__init__(**kwargs)
        self.share = share

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._estimate(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._estimate(state)
        super().on_step_end(args, state, control, **kwargs)

    def _estimate(self, state):
        if self.training_bar is not None:
            share = min(self.share(), 1.0)
            self.training_bar.total = round(state.global_step / share) if share else None
