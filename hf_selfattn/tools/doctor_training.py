"""Can it be trained? Checks of the doctor that train a copy, each (Examination) -> Findings.

The batch is made here (`labelled_batch`): random ordinary tokens with labels that no constant answer can give.
"""

import copy
import math
import tempfile
from collections import Counter

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .doctor_examination import error, listed, new_model, note, warning

ROWS = 4
STEPS = 40
RATES = (0.3, 0.1, 0.03)
"""Learning rates of AdamW that are tried, times the model's width: a step changes an answer by rate * width."""

TOKEN_HEADS = ("masked_lm", "causal_lm", "token_classification")
"""Heads that ask about tokens, -100 where nothing is asked."""


def copy_without_dropout(examination):
    """A copy in training mode whose loss is a function of weights and batch."""
    model = examination.model
    config = copy.deepcopy(model.config)
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    made = new_model(model, config)
    made.load_state_dict(model.state_dict())
    for own, theirs in zip(made.parameters(), model.parameters(), strict=True):
        own.requires_grad_(theirs.requires_grad)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made.train()


def _length(examination):
    return min(12, examination.positions or 12)


def _labels_of_tokens(examination, ids, mask):
    if examination.head == "causal_lm":
        return ids.masked_fill(mask == 0, -100)
    labels = torch.full_like(ids, -100)
    asked = mask.bool() & (torch.arange(ids.shape[1]) % 2 == 1)
    if examination.head == "masked_lm":
        labels[asked] = examination.ids([ids.numel()], seed=2)[0][: int(asked.sum())]
    else:
        labels[asked] = torch.arange(int(asked.sum())) % examination.config.num_labels
    return labels


def labelled_batch(examination):
    """Rows of several lengths with labels, as the model's forward takes them."""
    head, length = examination.head, _length(examination)
    lengths = torch.tensor([length, max(length - 3, 2), max(length - 5, 2), max(length - 8, 2)])
    ids = examination.ids([length] * ROWS)
    mask = (torch.arange(length) < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if head in TOKEN_HEADS:
        return batch | {"labels": _labels_of_tokens(examination, ids, mask)}
    if head == "question_answering":
        return batch | {"start_positions": lengths - 2, "end_positions": lengths - 1}
    if head == "multiple_choice":
        choices = [examination.ids([length] * ROWS, seed) for seed in range(3)]
        mask = mask.unsqueeze(1).expand(-1, len(choices), -1).contiguous()
        return {"input_ids": torch.stack(choices, 1), "attention_mask": mask, "labels": torch.arange(ROWS) % 3}
    count, kind = examination.config.num_labels, examination.config.problem_type
    if kind == "regression" or (kind is None and count == 1):
        return batch | {"labels": torch.linspace(-1, 1, ROWS * count).view(ROWS, count).squeeze(-1)}
    if kind == "multi_label_classification":
        return batch | {"labels": ((torch.arange(ROWS)[:, None] + torch.arange(count)) % 2).float()}
    return batch | {"labels": torch.arange(ROWS) % count}


def _entropy(labels):
    counts = torch.tensor(list(Counter(labels[labels != -100].flatten().tolist()).values()), dtype=torch.float64)
    share = counts / counts.sum()
    return float(-(share * share.log()).sum())


def loss_without_reading(examination, batch):
    """The least loss of a model that gives every row and every token the same answer."""
    if examination.head == "question_answering":
        return (_entropy(batch["start_positions"]) + _entropy(batch["end_positions"])) / 2
    labels = batch["labels"]
    if examination.head == "multiple_choice":
        return math.log(batch["input_ids"].shape[1])
    if not labels.is_floating_point():
        return _entropy(labels[:, 1:] if examination.head == "causal_lm" else labels)
    if examination.config.problem_type == "multi_label_classification":
        return sum(_entropy(column) for column in labels.T) / labels.shape[1]
    return float(labels.var(0, correction=0).mean())


def check_initial_loss(examination):
    """A new model of this configuration begins by guessing: a loss near ln(number of answers)."""
    head, config = examination.head, examination.config
    one_label = head == "sequence_classification" and config.problem_type in (None, "single_label_classification")
    if head not in TOKEN_HEADS and not one_label:
        return
    answers = config.vocab_size if head in ("masked_lm", "causal_lm") else config.num_labels
    if answers < 2:
        return
    with torch.no_grad():
        loss = float(examination.fresh(**labelled_batch(examination)).loss)
    guess = math.log(answers)
    if not abs(loss - guess) <= 0.25 * guess + 0.25:
        yield warning(
            f"A new model of this configuration has a loss of {loss:.3g} before training, where guessing among "
            f"{answers} answers has {guess:.3g}.",
            "Look at initializer_range, and whether the head's weights and the token vectors are of its size.",
        )


def check_no_labels(examination):
    """A batch in which no token has a label has a loss, and it is 0."""
    if examination.head not in TOKEN_HEADS:
        return
    batch = labelled_batch(examination)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = copy_without_dropout(examination)(**batch).loss
    if not loss.isfinite():
        yield warning(
            f"A batch without a single label has the loss {float(loss)}, and one such batch ruins the weights.",
            "Leave rows without labels out, and ask for at least one token in each; or divide the sum of the "
            "losses by max(1, number of labels).",
        )


class _KeepGradients(TrainerCallback):
    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _gradients_of_a_step(model, batch, pieces):
    """What the stock Trainer gives the optimizer where `batch` comes in so many pieces."""
    rows = [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]
    kept = _KeepGradients()
    verbosity = logging.get_verbosity()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        arguments = TrainingArguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=ROWS // pieces,
            gradient_accumulation_steps=pieces,
            max_grad_norm=0.0,
            learning_rate=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            log_level="error",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[kept])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logging.set_verbosity(verbosity)  # which the Trainer sets
    return kept.gradients


def _norm(tensors):
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))


def check_accumulation(examination):
    """The stock Trainer's gradient does not depend on how a batch is cut into accumulation steps."""
    batch = labelled_batch(examination)
    whole, cut = (_gradients_of_a_step(copy_without_dropout(examination), batch, pieces) for pieces in (1, ROWS))
    size, difference = _norm(whole.values()), _norm(cut[name] - gradient for name, gradient in whole.items())
    if difference <= 1e-3 * size:
        return
    training = None if examination.recipe is None else examination.recipe.training
    used = training is not None and (training.gradient_accumulation_steps > 1 or training.world_size > 1)
    ratio = _norm(cut.values()) / max(size, 1e-30)
    if 0.5 < ratio / ROWS < 2:
        yield (error if used else warning)(
            f"At {ROWS} accumulation steps loss and gradient are {ratio:.3g} times those of the same batch at once: "
            "the forward takes any argument, so the Trainer leaves the division to it, and it ignores "
            "num_items_in_batch. The same goes for several processes.",
            "Train on one device without accumulation; or set accepts_loss_kwargs = False on the model (then it is a "
            "mean of means), or divide the sum of the losses by num_items_in_batch in the model or in the Trainer's "
            "compute_loss_func.",
        )
    else:
        yield (warning if used else note)(
            f"Cut into {ROWS} accumulation steps the same batch has another gradient (it differs by "
            f"{difference / max(size, 1e-30):.0%}): means of pieces with unlike numbers of labels are averaged.",
            "Divide the sum of the losses by num_items_in_batch, in the model or in the Trainer's compute_loss_func.",
        )


def check_gradients(examination):
    """Every weight that may learn gets a gradient, and it is a number."""
    model = copy_without_dropout(examination)
    parameters = dict(model.named_parameters())
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    frozen = [name for name, p in parameters.items() if not p.requires_grad and p.dim() > 1]
    if not learning:
        yield error("No weight may learn: requires_grad is False for all.", "model.requires_grad_(True).")
        return
    if frozen:
        yield warning(
            f"{len(frozen)} matrices are frozen by the model's code (requires_grad is False): {listed(frozen)}.",
            "If they shall learn, set requires_grad_(True) on them.",
        )
    model(**labelled_batch(examination)).loss.backward()
    wrong = [name for name, p in learning.items() if p.grad is not None and not p.grad.isfinite().all()]
    if wrong:
        yield error(
            f"{len(wrong)} weights have a gradient of NaN or infinity: {listed(wrong)}.",
            "Look for a square root or a division at 0, or a softmax over nothing, in their layer.",
        )
    unused = [name for name, p in learning.items() if p.grad is None or (p.dim() > 1 and not p.grad.any())]
    if unused:
        yield warning(
            f"{len(unused)} weights take no part in the loss: {listed(unused)}. They never learn, and training on "
            "several devices stops (find_unused_parameters).",
            "Leave them out of the model, or freeze them.",
        )


def _least_loss(model, batch, goal, rate):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    least = math.inf
    for _ in range(STEPS):
        loss = model(**batch).loss
        least = min(least, float(loss))
        if least <= goal or not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return least


def check_overfitting(examination):
    """A few dozen steps on one batch bring the loss far below what is possible without reading the batch."""
    batch = labelled_batch(examination)
    blind = loss_without_reading(examination, batch)
    width = examination.model.get_input_embeddings().weight.shape[1]
    goal, least = blind / 2, math.inf
    for rate in RATES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            least = min(least, _least_loss(copy_without_dropout(examination), batch, goal, rate / width))
        if least <= goal:
            return
    yield error(
        f"One batch of {ROWS} short rows cannot be overfitted: in {STEPS} steps of AdamW its loss stays at "
        f"{least:.3g} or above, for learning rates from {RATES[-1] / width:.1g} to {RATES[0] / width:.1g}; without "
        f"reading the batch {blind:.3g} can be reached.",
        "Look for weights that do not learn (frozen, detached, zero), for labels that do not reach the loss, and for "
        "a head that does not read what the encoder gives.",
    )
