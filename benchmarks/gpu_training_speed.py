"""A training step of a masked language model on a GPU: ours, and transformers' ModernBERT with each of its attentions.

    python benchmarks/gpu_training_speed.py                      # 17 and 150 million parameters, bf16 autocast
    python benchmarks/gpu_training_speed.py --models small --tokens 65536
    python benchmarks/gpu_training_speed.py --device cpu --models tiny --tokens 512 --repeats 2     # does it run?

Both have the same layers: gated feed-forward, rotary positions, windows of 64 tokens on either side in two layers of
three. Documents are log-normal in length (median 0.45 of the longest), 30 % of their tokens have labels, and a step is
forward, loss, backward, fused AdamW and zero_grad. Tokens are real ones, without padding. ModernBERT's rows are sorted
into batches of like length, as its users can; what it cannot run here is written down with its error.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from measure import alternate, medians, write_result
from transformers import AutoModelForMaskedLM, ModernBertConfig

import hf_selfattn  # noqa: F401  registers the model with the Auto classes
from hf_selfattn import SelfAttnConfig

LONGEST, MASKED, RADIUS, GLOBAL_EVERY = 1024, 0.3, 64, 3


class Size(NamedTuple):
    """Layers, width, heads, inner width of the gated feed-forward, words, tokens of a step."""

    layers: int
    width: int
    heads: int
    inner: int
    words: int
    tokens: int


SIZES = {
    "tiny": Size(3, 64, 2, 96, 512, 2048),
    "small": Size(7, 256, 4, 432, 50368, 2**18),
    "base": Size(22, 768, 12, 1152, 50368, 2**16),
}
PEER_ATTENTIONS = ("sdpa", "flash_attention_2", "flex_attention", "eager")


def make_config(name: str, size: Size):
    """Configurations of one architecture in the two libraries."""
    common = {
        "vocab_size": size.words,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "pad_token_id": 0,
    }
    everywhere = [layer % GLOBAL_EVERY == 0 for layer in range(size.layers)]
    if name == "ModernBERT":
        kinds = ["full_attention" if x else "sliding_attention" for x in everywhere]
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        options = {"layer_types": kinds, "local_attention": 2 * RADIUS, "sparse_prediction": True}
        return ModernBertConfig(**common, **tokens, **options, max_position_embeddings=LONGEST)
    patterns = ["full" if x else "sliding_window" for x in everywhere]
    options = {"attention_bias": False, "hidden_act": "gelu", "attention_pattern": patterns, "window_radius": RADIUS}
    return SelfAttnConfig(**common, **options)


def draw_lengths(tokens: int, seed: int) -> list[int]:
    """Lengths of documents, `tokens` in all."""
    random = torch.Generator().manual_seed(seed)
    lengths = []
    while sum(lengths) < tokens:
        drawn = torch.empty(1).log_normal_(math.log(0.45 * LONGEST), 0.6, generator=random)
        lengths.append(min(max(round(drawn.item()), 8), LONGEST, tokens - sum(lengths)))
    return lengths


def make_batches(name: str, size: Size, tokens: int, seed: int, device: str) -> list[dict]:
    """The same documents for either: in one row with their boundaries, or in four padded batches of like length."""
    lengths = sorted(draw_lengths(tokens, seed), reverse=True)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, size.words, (sum(lengths),), generator=random)
    labels = ids.masked_fill(torch.rand(len(ids), generator=random) >= MASKED, -100)
    ids = ids.masked_fill(labels != -100, 4)
    if name == "ours":
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        rows = {"input_ids": ids[None], "labels": labels[None], "cu_seq_lens_q": boundaries}
        return [{key: x.to(device) for key, x in rows.items()}]
    batches, start = [], 0
    for part in torch.tensor(lengths).tensor_split(4):
        if not len(part):
            continue
        real = torch.arange(int(part.max())) < part[:, None]
        end = start + int(part.sum())
        rows = {"input_ids": torch.zeros(real.shape, dtype=torch.long), "labels": torch.full(real.shape, -100)}
        rows["input_ids"][real], rows["labels"][real] = ids[start:end], labels[start:end]
        batches.append({key: x.to(device) for key, x in {**rows, "attention_mask": real}.items()})
        start = end
    return batches


class Training:
    """One model with its optimizer; calling it does one step over all documents."""

    def __init__(self, name: str, attention: str | None, compiled: bool, size: Size, tokens: int, device: str):
        torch.manual_seed(0)
        options = {} if attention is None else {"attn_implementation": attention}
        self.model = AutoModelForMaskedLM.from_config(make_config(name, size), **options).to(device).train()
        self.parameters = sum(x.numel() for x in self.model.parameters())
        self.attention = self.model.config._attn_implementation
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batches, self.turn, self.device = (
            [make_batches(name, size, tokens, s, device) for s in range(4)],
            0,
            device,
        )
        self.labelled = [sum(int((x["labels"] != -100).sum()) for x in batches) for batches in self.batches]
        if compiled and name == "ours":
            self.model.compile_layers()
        elif compiled:
            self.model.compile(dynamic=True)
        self.first_loss, self.peak = None, None

    def __call__(self):
        number, self.turn = self.turn % len(self.batches), self.turn + 1
        total = 0.0
        for batch in self.batches[number]:
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.model(
                    **batch, num_items_in_batch=torch.tensor(self.labelled[number], device=self.device)
                ).loss
            loss.backward()
            total = total + loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.first_loss = total.item() if self.first_loss is None else self.first_loss


def flops_of_step(size: Size, tokens: int) -> float:
    """Useful FLOPs, forward and backward: GEMMs over tokens and labels, attention over pairs that are seen."""
    lengths = draw_lengths(tokens, 0)
    layers_full = -(-size.layers // GLOBAL_EVERY)
    full = sum(n * n for n in lengths)
    near = sum(n * min(n, 2 * RADIUS + 1) for n in lengths)
    pairs = layers_full * full + (size.layers - layers_full) * near
    matrices = size.layers * (4 * size.width**2 + 3 * size.width * size.inner)
    head = MASKED * (size.width**2 + size.width * size.words)
    return 3 * (2 * tokens * (matrices + head) + 4 * size.width * pairs)


def gemm_rate(device: str) -> float:
    """FLOP/s in bf16 of a square product of 8,192 (512 on a CPU), the median of 20."""
    n = 8192 if device == "cuda" else 512
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply():
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * n**3 / statistics.median(alternate({"gemm": multiply}, 20, warmup=3)["gemm"])


def measure(name: str, size: Size, tokens: int, repeats: int, device: str, rate: float) -> tuple[dict, dict]:
    """(samples, table) of ours and of the peer, in turn."""
    runs = {f"ours{', compiled' * c}": ("ours", None, c) for c in (False, True)}
    runs |= {f"ModernBERT {a}{', compiled' * c}": ("ModernBERT", a, c) for a in PEER_ATTENTIONS for c in (False, True)}
    trainings, refused = {}, {}
    for key, (model, attention, compiled) in runs.items():
        try:
            training = Training(model, attention, compiled, size, tokens, device)
            for turn in range(5):
                if turn == 4 and device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                training()
            if device == "cuda":
                own = sum(x.numel() * x.element_size() for x in training.model.parameters()) * 3
                training.peak = (torch.cuda.max_memory_allocated() - held + own) / 2**30
            trainings[key] = training
        except Exception as error:  # what a peer cannot run on this machine is part of the result
            refused[key] = f"{type(error).__name__}: {str(error)[:200]}"
            if model == "ours":
                raise
    samples = alternate(trainings, repeats, warmup=1)
    flops, table = flops_of_step(size, tokens), {}
    print(f"\n{name}: {tokens:,} real tokens a step")
    for key, seconds in sorted(medians(samples).items(), key=lambda item: item[1]):
        training = trainings[key]
        table[key] = {
            "attention": training.attention,
            "parameters": training.parameters,
            "first_loss": training.first_loss,
            "ms": seconds * 1000,
            "tokens_per_second": tokens / seconds,
            "share_of_gemm_rate": flops / seconds / rate,
            "peak_gib": training.peak,
        }
        print(
            f"{key:40} {seconds * 1000:9.1f} ms {tokens / seconds:12,.0f} tokens/s {flops / seconds / rate:7.1%} ",
            end="",
        )
        print(
            "" if training.peak is None else f"{training.peak:6.2f} GiB", f"loss {training.first_loss:.3f}", flush=True
        )
    for key, error in refused.items():
        print(f"{key:40} {error}")
    return samples, {"table": table, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["small", "base"])
    parser.add_argument("--tokens", type=int, help="real tokens of a step; without it each size's own")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_training_speed.json"))
    arguments = parser.parse_args()
    rate = gemm_rate(arguments.device)
    samples, results = {}, {}
    for name in arguments.models:
        tokens = arguments.tokens or SIZES[name].tokens
        found, results[name] = measure(name, SIZES[name], tokens, arguments.repeats, arguments.device, rate)
        samples |= {f"{key} | {name}": seconds for key, seconds in found.items()}
    config = {"models": arguments.models, "tokens": arguments.tokens, "repeats": arguments.repeats}
    write_result(arguments.output, config, samples, results=results, gemm_flops=rate)


if __name__ == "__main__":
    main()
