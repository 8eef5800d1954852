"""Muon for the matrices inside of the encoder and AdamW for all else, as one optimizer; what decays in either."""

import re

import torch
from torch import nn

BIASES_BY_ANOTHER_NAME = re.compile(r"(^|\.)(log_scale|sink|slopes|table)$")
"""The temperature of a score, the attention sink, ALiBi's slopes and T5's table: numbers that are added to scores, or
multiply them, like a bias or a norm's gain."""


def without_biases(model, names):
    """Of the parameter names that the stock Trainer decays (no `bias`, no norm), those that are matrices.

    Token vectors stay among them, as in BERT and ModernBERT.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if parameters[name].ndim >= 2 and not BIASES_BY_ANOTHER_NAME.search(name)]


def hidden_matrices(model):
    """Names of the weights for Muon: linear layers of the encoder, `model.base_model`.

    Embeddings, the head on top of the encoder, norms, biases and what is flattened for heads are not: their updates
    should not be orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    encoder = {id(module.weight) for module in model.base_model.modules() if isinstance(module, nn.Linear)}
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    encoder.discard(id(getattr(outputs, "weight", None)))
    return {name for name, parameter in model.named_parameters() if id(parameter) in encoder and parameter.ndim == 2}


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and fused `torch.optim.AdamW` behind one list of groups and one state.

    A learning rate scheduler, gradient clipping, accelerate and checkpoints see an ordinary optimizer: both parts work
    on the same group dicts and the same state, which stay shared when a state is loaded.

    Args:
        groups: dicts with `params` and whatever the part takes; `uses_muon` says which part.
    """

    def __init__(self, groups):
        groups = [dict(group) for group in groups]
        parts = ([group for group in groups if group["uses_muon"] == mine] for mine in (True, False))
        matrices, others = parts
        self.parts = ([torch.optim.Muon(matrices)] if matrices else []) + (
            [torch.optim.AdamW(others, fused=True)] if others else []
        )
        made = {id(group["params"][0]): group for part in self.parts for group in part.param_groups}
        super().__init__([made[id(next(iter(group["params"])))] for group in groups], {})
        self._share()

    def _share(self):
        for part in self.parts:
            part.state = self.state
            wanted = isinstance(part, torch.optim.Muon)
            part.param_groups = [group for group in self.param_groups if group["uses_muon"] == wanted]

    def __setstate__(self, state):
        super().__setstate__(state)
        self._share()

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def muon_with_adamw(model, *, decay_names, lr, muon_lr, weight_decay, betas, eps, muon):
    """The optimizer of a model; the form in which the stock Trainer calls an optimizer factory.

    Weight decay is that of each part: a step shrinks the weights by learning rate * weight_decay.

    Args:
        decay_names: function from the model to the names of the parameters that decay.
        lr, betas, eps: of AdamW.
        muon_lr: the learning rate of Muon.
        muon: further options of torch.optim.Muon (momentum, nesterov, ns_steps, adjust_lr_fn).

    Raises:
        ValueError: where nothing in the encoder is a matrix to Muon.
    """
    matrices, decayed = hidden_matrices(model), set(decay_names(model))
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Fused kernels take one device mesh at a time.
            kind = (name in matrices, name in decayed, getattr(parameter, "device_mesh", None))
            groups.setdefault(kind, []).append(parameter)
    if not any(uses_muon for uses_muon, *_ in groups):
        raise ValueError(
            f"--optimizer muon is for the weights of an encoder's linear layers, and {type(model).__name__} has none "
            "that train. Use --optimizer adamw."
        )
    # AdamW first: the Trainer logs the learning rate of the first group.
    return MuonWithAdamW(
        [
            {
                "params": groups[kind],
                "uses_muon": kind[0],
                "weight_decay": weight_decay if kind[1] else 0.0,
                **({"lr": muon_lr, **muon} if kind[0] else {"lr": lr, "betas": betas, "eps": eps}),
            }
            for kind in sorted(groups, key=lambda kind: (kind[0], not kind[1]))
        ]
    )


def muon_factory():
    """What stands in place of an optimizer class in the Trainer's `optimizer_cls_and_kwargs`."""
    return muon_with_adamw
