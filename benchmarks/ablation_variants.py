"""Changes that ablations.py tries and no option has: made here, round a training script.

    python benchmarks/ablation_variants.py zero_outputs train/pretrain.py recipe.yaml        # several: a+b

What is worth its place becomes an option; the rest stays here, so that its row can be run again.
"""

import itertools
import runpy
import sys

import torch
from torch import nn
from transformers import BertForMaskedLM, ModernBertForMaskedLM, TrainerCallback
from transformers.modeling_outputs import MaskedLMOutput

from hf_selfattn import SelfAttnForMaskedLM, SelfAttnPreTrainedModel
from hf_selfattn.attention import SelfAttention
from hf_selfattn.layers import FeedForward
from hf_selfattn.tools import packed_rows
from hf_selfattn.tools.pretraining import PretrainingTrainer


def zero_outputs():
    """Attention and feed-forward add nothing at first: their last projections begin at 0 (Zhang et al. 2019)."""
    initial = SelfAttnPreTrainedModel._init_weights

    def _init_weights(self, module):
        initial(self, module)
        if isinstance(module, (SelfAttention, FeedForward)):
            nn.init.zeros_((module.o_proj if isinstance(module, SelfAttention) else module.down_proj).weight)

    SelfAttnPreTrainedModel._init_weights = _init_weights


def value_residuals():
    """Each layer's values are a learned mixture of its own and the first layer's (Zhou et al. 2024, 2410.17897)."""
    initial = SelfAttnForMaskedLM.__init__

    def make(self, config):
        initial(self, config)
        first = []

        def keep(module, inputs, value):
            first[:] = [value]

        def mix(module, inputs, value):
            return module.own * value + module.first * first[0]

        for number, layer in enumerate(self.model.layers):
            projection = layer.attention.v_proj
            if number:
                projection.own = nn.Parameter(torch.tensor(0.5))
                projection.first = nn.Parameter(torch.tensor(0.5))
            projection.register_forward_hook(mix if number else keep)

    SelfAttnForMaskedLM.__init__ = make


class Average(TrainerCallback):
    """The mean of the weights after each tenth step of the last `share` of a training takes their place.

    Where no such step is, the weights stay as they are.
    """

    def __init__(self, trainer, share):
        self.trainer, self.share, self.count, self.mean = trainer, share, 0, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.trainer.progress.share() < 1 - self.share or state.global_step % 10:
            return
        self.count += 1
        weights = [parameter.detach() for parameter in model.parameters()]
        if self.mean is None:
            self.mean = [weight.clone() for weight in weights]
        else:
            torch._foreach_lerp_(self.mean, weights, 1 / self.count)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.mean is not None:
            for parameter, mean in zip(model.parameters(), self.mean, strict=True):
                parameter.data.copy_(mean)


def averaged(share):
    """The last `share` of a training, averaged (Izmailov et al. 2018)."""
    initial = PretrainingTrainer.__init__

    def make(self, *args, **kwargs):
        initial(self, *args, **kwargs)
        self.add_callback(Average(self, share))

    PretrainingTrainer.__init__ = make


def batch_ramp(sizes=(4, 8, 16, 32)):
    """Batches of growing size, each for the same share of the budget (Smith et al. 2018, 1711.00489)."""
    initial, trainers = PretrainingTrainer.__init__, []

    def make(self, *args, **kwargs):
        initial(self, *args, **kwargs)
        trainers.append(self)

    def batches(sampler):
        rows = iter(sampler.sampler)
        while True:
            share = min(trainers[0].progress.share(), 0.999)
            batch = list(itertools.islice(rows, sizes[int(share * len(sizes))]))
            if not batch:
                return
            yield batch

    PretrainingTrainer.__init__ = make
    torch.utils.data.BatchSampler.__iter__ = batches


def sparse_predictions():
    """Stock BERT and ModernBERT make logits at labelled places alone while they train, as ours always does."""
    for stock, encoder, head in (
        (BertForMaskedLM, "bert", lambda model, hidden: model.cls(hidden)),
        (ModernBertForMaskedLM, "model", lambda model, hidden: model.decoder(model.head(hidden))),
    ):
        stock.forward = _sparse(stock.forward, encoder, head)


def _sparse(dense, encoder, head):
    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        if not self.training or labels is None:
            return dense(self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        outputs = getattr(self, encoder)(input_ids=input_ids, attention_mask=attention_mask)
        asked = labels != -100
        logits = head(self, outputs.last_hidden_state[asked])
        loss = nn.functional.cross_entropy(logits.float(), labels[asked], reduction="sum")
        return MaskedLMOutput(loss=loss / (asked.sum() if num_items_in_batch is None else num_items_in_batch))

    return forward


def stock():
    """A stock model at its fastest: sparse predictions, and full rows, in which documents see each other."""
    sparse_predictions()
    packed_rows.choose_packing = lambda *asked: True
    collate, apart = packed_rows.PackingCollator.__call__, ("position_ids", "cu_seq_lens", "max_length")

    def joined(self, items):
        return {name: values for name, values in collate(self, items).items() if not name.startswith(apart)}

    packed_rows.PackingCollator.__call__ = joined


VARIANTS = {
    "stock": stock,
    "batch_ramp": batch_ramp,
    "zero_outputs": zero_outputs,
    "value_residuals": value_residuals,
    "averaged_20": lambda: averaged(0.2),
    "averaged_5": lambda: averaged(0.05),
}

if __name__ == "__main__":
    names, script, *arguments = sys.argv[1:]
    for name in names.split("+"):
        VARIANTS[name]()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
