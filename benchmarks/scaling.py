"""Time and memory of a training step against the length of the text, ours and the built-in encoders.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py                       # the table at 4,096 tokens and the curve
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --lengths 1024 4096   # fewer lengths
    python benchmarks/scaling.py --picture benchmarks/results/scaling.json docs/scaling.png

Base models without a head, 2 layers of 128, B = 1, dropout 0; forward, sum of squares, backward. One thread, models in
turn, medians. BERT, Longformer and "learned" add a table of positions, the others turn query and key. Windows see 64
tokens on either side in all models that have them; BigBird has its published blocks.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from measure import alternate, medians, peak_memory, print_peak_memory, write_result
from transformers import AutoModel, BertConfig, BigBirdConfig, LongformerConfig, ModernBertConfig

from hf_selfattn import SelfAttnConfig

SIZE = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
OURS = {
    "intermediate_size": 512,
    "mlp_type": "plain",
    "hidden_act": "gelu",
    "attention_bias": False,
    "attn_implementation": "selfattn",
}


def make_config(name: str, length: int):
    """The configuration of one of MODELS for texts of `length` tokens."""
    if name.startswith("ours"):
        options = {
            "ours, window": {"attention_pattern": "sliding_window", "window_radius": 64},
            "ours, window, learned": {
                "attention_pattern": "sliding_window",
                "window_radius": 64,
                "position_encoding": "learned",
                "max_position_embeddings": length,
            },
            "ours, bigbird": {"attention_pattern": "bigbird"},
            "ours, full": {},
        }[name]
        return SelfAttnConfig(**SIZE, **OURS, **options)
    if name == "BERT, sdpa":
        return BertConfig(**SIZE, **NO_DROPOUT, intermediate_size=512, max_position_embeddings=length)
    if name == "ModernBERT, window":
        windows = {"local_attention": 128, "layer_types": ["sliding_attention"] * 2}
        return ModernBertConfig(**SIZE, **TOKENS, **windows, intermediate_size=340, max_position_embeddings=length)
    positions = {"intermediate_size": 512, "max_position_embeddings": length + 2}
    if name == "Longformer, window":
        return LongformerConfig(**SIZE, **NO_DROPOUT, **positions, attention_window=128, pad_token_id=1)
    return BigBirdConfig(**SIZE, **NO_DROPOUT, **positions, attention_type="block_sparse")


WINDOWS = ("BERT, sdpa", "ModernBERT, window", "Longformer, window", "ours, window", "ours, window, learned")
BIGBIRDS = ("BigBird", "ours, bigbird")
MODELS = (*WINDOWS, *BIGBIRDS, "ours, full")
BF16_CRASHES = ("BigBird",)


def training_step(name: str, length: int, bf16: bool):
    """A function that does one forward and backward."""
    torch.manual_seed(0)
    model = AutoModel.from_config(make_config(name, length)).train()
    tokens = torch.randint(3, 1000, (1, length))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model(tokens).last_hidden_state
        hidden.float().pow(2).sum().backward()

    return step


def exponent(times: dict[int, float], low: int, high: int) -> float:
    """p where time grows as length^p from `low` to `high` tokens."""
    return float(torch.log(torch.tensor(times[high] / times[low])) / torch.log(torch.tensor(high / low)))


def measure(lengths: list[int], repeats: int, longest_dense: int) -> dict:
    """Samples by 'model | length | dtype'; models that hold every pair stop at `longest_dense` tokens."""
    samples = {}
    for length in lengths:
        for dtype in ("fp32", "bf16"):
            names = [n for n in MODELS if not (dtype == "bf16" and n in BF16_CRASHES)]
            dense = ("BERT, sdpa", "ModernBERT, window", "ours, full")
            names = [n for n in names if length <= longest_dense or n not in dense]
            steps = {f"{n} | {length} | {dtype}": training_step(n, length, dtype == "bf16") for n in names}
            found = alternate(steps, repeats)
            for name, seconds in medians(found).items():
                print(f"{name:40} {seconds * 1000:9.1f} ms", flush=True)
            samples |= found
            del steps
            gc.collect()
    return samples


def draw(result: Path, picture: Path) -> None:
    """Two panels from the JSON: milliseconds and GiB against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(result.read_text(encoding="utf-8"))
    curves = {"ms of a training step, fp32": {}, "GiB at the peak, fp32": {}}
    for key, seconds in found["medians"].items():
        name, length, dtype = key.split(" | ")
        if dtype == "fp32":
            curves["ms of a training step, fp32"].setdefault(name, []).append((int(length), seconds * 1000))
    for key, gib in found["peak_gib"].items():
        name, length = key.split(" | ")
        curves["GiB at the peak, fp32"].setdefault(name, []).append((int(length), gib))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        for name in MODELS:
            if name in lines:
                x, y = zip(*sorted(lines[name]), strict=True)
                panel.plot(x, y, "o-" if name.startswith("ours") else "s--", label=name, markersize=4)
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        panel.grid(True, which="both", alpha=0.2)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    print(f"written: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--memory_lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--longest_dense", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--picture", nargs=2, type=Path, metavar=("JSON", "PNG"))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LENGTH"), help="one step, and its peak of memory in GiB")
    arguments = parser.parse_args()
    if arguments.picture:
        return draw(*arguments.picture)
    if arguments.one:
        training_step(arguments.one[0], int(arguments.one[1]), bf16=False)()
        return print_peak_memory()

    samples = measure(arguments.lengths, arguments.repeats, arguments.longest_dense)
    peaks = {}
    for length in arguments.memory_lengths:
        for name in MODELS:
            linear = name == "Longformer, window" or (name.startswith("ours") and name != "ours, full")
            if length <= arguments.longest_dense or linear:
                peaks[f"{name} | {length}"] = peak_memory(__file__, "--one", name, str(length))
                print(f"{name:22} {length:6} tokens {peaks[f'{name} | {length}']:6.2f} GiB", flush=True)
    found = medians(samples)
    exponents = {}
    for name in ("ours, window", "ours, window, learned", "ours, bigbird"):
        times = {n: found[f"{name} | {n} | fp32"] for n in arguments.lengths}
        exponents[name] = exponent(times, min(times), max(times)) if len(times) > 1 else None
    config = {"size": SIZE, "lengths": arguments.lengths, "repeats": arguments.repeats}
    write_result(arguments.output, config, samples, peak_gib=peaks, exponents=exponents)
    print(f"exponents: {exponents}")
    return None


if __name__ == "__main__":
    main()
