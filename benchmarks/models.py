"""The models of the speed benchmarks: ours and its peers, of one size, each with every flag that may make it fast.

4 layers x 256, 4 heads, 8,192 words, tied embeddings, no dropout; parameters within 5 % of each other.
"""

import contextlib
from dataclasses import asdict, dataclass, replace

import torch
from batches import IGNORED, VOCABULARY, Batch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, ModernBertConfig

from hf_selfattn import SelfAttnConfig

LAYERS, WIDTH, HEADS = 4, 256, 4
PLAIN, GATED = 1024, 704  # inner widths of the feed-forward with the same number of parameters
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PEERS = ("BERT", "ModernBERT", "nn.TransformerEncoder", "x-transformers")

ATTENTIONS = {
    "BERT": ("sdpa", "eager"),
    "ModernBERT": ("sdpa", "eager"),
    "nn.TransformerEncoder": ("sdpa", "math", "fused"),
    "x-transformers": ("sdpa", "eager", "eager, half"),
}
"""How each peer can compute attention on a CPU. 'math': SDPA's own plain road; 'fused': PyTorch's fused layer, which
drops padding ("nested tensors"), without gradients only; 'eager, half': softmax in bf16."""

OURS = {
    "attn_implementation": "selfattn",
    "intermediate_size": GATED,
    "attention_bias": False,
    "hidden_act": "gelu",
}
"""Options of SelfAttnConfig beside the size, in benchmarks of speed; no biases and GELU in the gate, as ModernBERT."""


@dataclass(frozen=True)
class Flags:
    """How a model is run; what it computes stays the same (but for `windows`).

    Attributes:
        attention: a row of ATTENTIONS, or one of our kernels.
        precision: "fp32"; "medium" (`torch.set_float32_matmul_precision`); "autocast" (bf16, weights in fp32); "bf16"
            (weights and optimizer too).
        compiled: torch.compile; a name is its mode; "layers" (ours): each layer by itself, `compile_layers`.
        sparse: logits at labelled positions only.
        rows: "padded", "packed" or "documents", see `batches.lay_out`.
        windows: ModernBERT's windows of 64 tokens on either side in two layers of three; False: full attention.
        options: more options of SelfAttnConfig, as pairs.
    """

    attention: str = "sdpa"
    precision: str = "fp32"
    compiled: bool | str = False
    sparse: bool = False
    rows: str = "padded"
    windows: bool = True
    options: tuple = ()

    def __str__(self):
        compiled = self.compiled if isinstance(self.compiled, str) else "compile" if self.compiled else ""
        windows = "" if self.windows else "full"
        parts = (self.attention, self.precision, compiled, "sparse" if self.sparse else "", self.rows, windows)
        return " ".join([part for part in parts if part] + [f"{name}={value}" for name, value in self.options])

    def as_dict(self) -> dict:
        return asdict(self)


def make_model(name: str, flags: Flags, longest: int, head: bool = True) -> nn.Module:
    """A model of PEERS or 'ours…' in fp32, not compiled, with weights that give a loss of ln(8192) at first."""
    torch.manual_seed(0)
    if name in ("BERT", "ModernBERT") or name.startswith("ours"):
        auto = AutoModelForMaskedLM if head else AutoModel
        more = {"add_pooling_layer": False} if name == "BERT" and not head else {}
        model = auto.from_config(_config(name, flags, longest), attn_implementation=flags.attention, **more)
    else:
        cls = TorchEncoder if name == "nn.TransformerEncoder" else XTransformer
        model = cls(flags, longest, head)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.005 if "emb" in key else 0.02)
            elif key.endswith("bias"):
                nn.init.zeros_(parameter)
    return model


def _config(name: str, flags: Flags, longest: int):
    if name == "BERT":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertConfig(**SIZE, **dropout, intermediate_size=PLAIN, max_position_embeddings=longest)
    if name == "ModernBERT":
        layers = None if flags.windows else ["full_attention"] * LAYERS
        options = {"sparse_prediction": flags.sparse, "layer_types": layers, "max_position_embeddings": longest}
        return ModernBertConfig(**SIZE, **TOKENS, **options, intermediate_size=GATED)
    return SelfAttnConfig(**SIZE, **{**OURS, "attn_implementation": flags.attention, **dict(flags.options)})


def prepare(model: nn.Module, flags: Flags) -> nn.Module:
    """Weights to bf16 and torch.compile, if the flags say so."""
    if flags.precision == "bf16":
        model = model.to(torch.bfloat16)
    if flags.compiled:
        # Weights laid out for the GEMMs once: 1.3 times faster.
        torch._inductor.config.freezing = not model.training
        # One graph for the whole model where labelled positions are picked by a mask.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        # Several models of one class share code: torch's limit of 8 would silently leave the later ones uncompiled.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
        if flags.compiled == "layers":
            model.compile_layers()
            return model
        model.compile(**({"mode": flags.compiled} if isinstance(flags.compiled, str) else {}))
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def precision(flags: Flags):
    """The process-wide setting in which a model of these flags runs its forward and backward."""
    torch.set_float32_matmul_precision("medium" if flags.precision == "medium" else "highest")
    torch.backends.mha.set_fastpath_enabled(flags.attention == "fused")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def inputs(name: str, flags: Flags, batch: Batch, head: bool = True) -> dict:
    """What the model's forward takes, prepared outside of the timing, as a data loader's worker would."""
    dtype = torch.float32 if flags.precision in ("fp32", "medium") else torch.bfloat16
    if name in ("BERT", "ModernBERT"):
        mask = batch.real
        if batch.blocks is not None:
            mask = _block_mask(batch.blocks, dtype, additive=flags.attention == "eager")
            if name == "ModernBERT":
                place = torch.arange(batch.ids.shape[1])
                near = (place[:, None] - place[None, :]).abs() <= 64
                local = _block_mask(batch.blocks & near, dtype, additive=flags.attention == "eager")
                mask = {"full_attention": mask, "sliding_attention": local}
        found = {"input_ids": batch.ids, "attention_mask": mask, "position_ids": batch.positions}
    elif name.startswith("ours"):
        found = {"input_ids": batch.ids, "attention_mask": batch.real}
        if batch.boundaries is not None:
            found["cu_seq_lens_q"] = batch.boundaries
    else:
        blocks = batch.blocks
        if name == "nn.TransformerEncoder" and blocks is not None:
            blocks = _block_mask(blocks.repeat(1, HEADS, 1, 1).flatten(0, 1), dtype, additive=True)
        found = {"ids": batch.ids, "real": batch.real, "positions": batch.positions, "blocks": blocks}
        if head:
            found["labelled"] = batch.labelled if flags.sparse else None
    if head:
        found["labels"] = batch.labels
    return {key: value for key, value in found.items() if value is not None}


def _block_mask(allowed: torch.Tensor, dtype: torch.dtype, additive: bool) -> torch.Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf) if additive else allowed


def run(model: nn.Module, flags: Flags, kwargs: dict):
    """The forward: the loss where labels are given, else the last hidden states."""
    with torch.autocast("cpu", torch.bfloat16, enabled=flags.precision == "autocast"):
        output = model(**kwargs)
    if isinstance(output, torch.Tensor):
        return output
    return output.loss if "labels" in kwargs else output.last_hidden_state


class Head(nn.Module):
    """BERT's masked language model's head on a tied table, for the peers that bring none."""

    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = table

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor | None) -> torch.Tensor:
        """The loss; with `labelled`, logits are made there and nowhere else."""
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        if labelled is not None:
            hidden, labels = hidden.index_select(0, labelled), labels.index_select(0, labelled)
        logits = self.decoder(self.norm(F.gelu(self.dense(hidden))))
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


class TorchEncoder(nn.Module):
    """PyTorch's own encoder with learned positions."""

    def __init__(self, flags: Flags, longest: int, head: bool):
        super().__init__()
        self.math = flags.attention == "math"
        self.token_emb = nn.Embedding(VOCABULARY, WIDTH)
        self.position_emb = nn.Embedding(longest, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, PLAIN, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = Head(self.token_emb.weight) if head else None

    def forward(self, ids, labels=None, real=None, positions=None, blocks=None, labelled=None):
        if positions is None:
            positions = torch.arange(ids.shape[1])
        hidden = self.norm(self.token_emb(ids) + self.position_emb(positions))
        padding = None if real is None else ~real
        with sdpa_kernel(SDPBackend.MATH) if self.math else contextlib.nullcontext():
            hidden = self.encoder(hidden, mask=blocks, src_key_padding_mask=padding)
        return hidden if labels is None else self.head(hidden, labels, labelled)


class XTransformer(nn.Module):
    """x-transformers' encoder, as its README shows it: pre-norm, plain feed-forward, learned positions."""

    def __init__(self, flags: Flags, longest: int, head: bool):
        super().__init__()
        from x_transformers import Encoder, TransformerWrapper

        options = {"attn_flash": flags.attention == "sdpa"}
        if flags.attention == "eager, half":
            options["attn_custom_attn_fn"] = _softmax
        layers = Encoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, **options)
        self.wrapper = TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=longest, attn_layers=layers, return_only_embed=True
        )
        self.head = Head(self.wrapper.token_emb.emb.weight) if head else None

    def forward(self, ids, labels=None, real=None, positions=None, blocks=None, labelled=None):
        # Its own `mask` costs more, and turns bf16 to fp32, which fails in pure bf16.
        seen = real[:, None, None] if real is not None else blocks
        more = {} if seen is None else {"attn_mask": seen}
        hidden = self.wrapper(ids, pos=positions, **more)
        return hidden if labels is None else self.head(hidden, labels, labelled)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, dim=-1)


PRECISIONS = ("fp32", "medium", "autocast", "bf16")


def combinations(name: str, packable: bool, head: bool, precisions: tuple = PRECISIONS) -> list[Flags]:
    """Every combination of a peer's flags without torch.compile, the defaults first."""
    found = []
    for attention in ATTENTIONS[name]:
        for kind in precisions:
            for rows in ("padded", "packed") if packable else ("padded",):
                for windows in (True, False) if name == "ModernBERT" else (True,):
                    if attention == "eager, half" and kind in ("fp32", "medium"):
                        continue
                    if attention == "fused" and (head or kind == "autocast"):  # autocast fails there
                        continue
                    flags = Flags(attention, kind, rows=rows, windows=windows)
                    # Stock BERT has no way to make fewer logits; the others never lose by it.
                    found.append(replace(flags, sparse=head and name != "BERT"))
    return found
