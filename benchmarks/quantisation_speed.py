"""The forward of our encoder in fp32, bf16 and int8 (torchao), and what a masked language model loses by it.

    OMP_NUM_THREADS=1 python benchmarks/quantisation_speed.py --clock cpu                      # speed
    OMP_NUM_THREADS=1 python benchmarks/quantisation_speed.py --checkpoint runs/quickstart     # and accuracy

Speed: hidden states, no gradient, 4 layers of two widths on two batches without padding; each as it is and with
`compile_layers` (weights frozen). One thread, all in turn in one process, medians. Accuracy: 15 % of the tokens of the
quickstart's 1,000 validation documents, and the size of the saved weights.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import CLOCKS, alternate, medians, write_result
from models import OURS, SIZE, Flags, count_parameters, prepare
from torch import nn
from torch.utils.data import DataLoader
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TorchAoConfig

from hf_selfattn import SelfAttnConfig
from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.docstrings import load_docstrings
from hf_selfattn.tools.fast_defaults import keep_memory
from hf_selfattn.tools.sources import take
from hf_selfattn.tools.training import Rows
from hf_selfattn.tools.windows import as_rows

SCHEMES: dict[str, tuple[torch.dtype, Callable | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8 weights": (torch.float32, Int8WeightOnlyConfig),
    "int8 weights, bf16": (torch.bfloat16, Int8WeightOnlyConfig),
    "int8 dynamic": (torch.float32, Int8DynamicActivationInt8WeightConfig),
    "int8 dynamic, bf16": (torch.bfloat16, Int8DynamicActivationInt8WeightConfig),
}
"""The type of all that is not quantised, and torchao's configuration."""

TORCHS_OWN = "torch's quantize_dynamic"
WIDTHS = {"4 x 256": (256, 4, 704), "4 x 768": (768, 12, 2048)}
BATCHES = {"8 texts of 128": (8, 128), "1 text of 32": (1, 32)}
INSTRUCTIONS = ("avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
"""What decides how fast bf16 and int8 are on an x86 processor."""


def make_encoder(width: str, scheme: str, compiled: bool) -> nn.Module:
    """An encoder of WIDTHS with fresh weights, the same in every scheme."""
    hidden, heads, inner = WIDTHS[width]
    size = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner}
    torch.manual_seed(0)
    model = AutoModel.from_config(SelfAttnConfig(**{**SIZE, **OURS, **size})).eval()
    if scheme == TORCHS_OWN:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    dtype, config = SCHEMES[scheme]
    model = model.to(dtype)
    if config is not None:
        quantize_(model, config(set_inductor_config=False))
    return prepare(model, Flags(compiled="layers" if compiled else False))


def measure_speed(width: str, compiled: bool, repeats: int, clock: str) -> tuple[dict, dict]:
    """(samples, table) of all schemes in turn, for each of BATCHES."""
    schemes = [*SCHEMES] if compiled else [*SCHEMES, TORCHS_OWN]
    models = {scheme: make_encoder(width, scheme, compiled) for scheme in schemes}
    samples, table = {}, {}
    for batch, shape in BATCHES.items():
        ids = torch.randint(5, SIZE["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
        found = alternate({scheme: forward(model, ids) for scheme, model in models.items()}, repeats, 3, clock)
        where = f"{width} | {batch} | {'compiled' if compiled else 'eager'}"
        samples |= {f"{where} | {scheme}": seconds for scheme, seconds in found.items()}
        table[where] = {scheme: seconds * 1000 for scheme, seconds in medians(found).items()}
        print(f"\n{where}: {count_parameters(models['fp32']):,} parameters")
        for scheme, ms in table[where].items():
            print(f"{scheme:26} {ms:8.1f} ms  {table[where]['fp32'] / ms:5.2f} x fp32", flush=True)
    return samples, table


def forward(model: nn.Module, ids: torch.Tensor) -> Callable:
    @torch.inference_mode()
    def step():
        return model(ids)

    return step


def measure_accuracy(checkpoint: Path) -> dict[str, dict]:
    """Loss in nats, accuracy and MB of the saved weights, for each scheme."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = take(load_docstrings()["validation"], 1000, 0)
    rows = Rows(as_rows(documents, "text", tokenizer, 128, "truncate"))
    batches = list(DataLoader(rows, 64, collate_fn=MaskingCollator(tokenizer, 0.15, 0)))
    found = {}
    for scheme, (dtype, config) in SCHEMES.items():
        how = {} if config is None else {"quantization_config": TorchAoConfig(config(set_inductor_config=False))}
        model = AutoModelForMaskedLM.from_pretrained(checkpoint, dtype=dtype, **how)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = Path(folder, "model.safetensors").stat().st_size / 1e6
        found[scheme] = {**masked_tokens(model, batches), "megabytes": size}
    model = AutoModelForMaskedLM.from_pretrained(checkpoint)
    torch.ao.quantization.quantize_dynamic(model.model, {nn.Linear}, inplace=True)
    found[TORCHS_OWN] = masked_tokens(model, batches)
    for scheme, numbers in found.items():
        print(f"{scheme:26}", {name: round(number, 4) for name, number in numbers.items()}, flush=True)
    return found


@torch.inference_mode()
def masked_tokens(model: nn.Module, batches: list[dict]) -> dict[str, float]:
    loss = right = count = 0
    for batch in batches:
        outputs, labelled = model(**batch), batch["labels"] != -100
        guesses = outputs.logits[labelled].argmax(-1)
        loss += outputs.loss.item() * len(guesses)
        right += int((guesses == batch["labels"][labelled]).sum())
        count += len(guesses)
    return {"loss": loss / count, "accuracy": right / count, "masked_tokens": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine too")
    parser.add_argument("--checkpoint", type=Path, help="a masked language model of the quickstart, for accuracy")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantisation_speed.json"))
    arguments = parser.parse_args()
    keep_memory()
    warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")

    accuracy = measure_accuracy(arguments.checkpoint) if arguments.checkpoint else None
    samples, table = {}, {}
    for compiled in (False, True):
        for width in arguments.widths:
            more, rows = measure_speed(width, compiled, arguments.repeats, arguments.clock)
            samples, table = {**samples, **more}, {**table, **rows}
    instructions = {name: torch.cpu.get_capabilities().get(name, False) for name in INSTRUCTIONS}
    config = {"repeats": arguments.repeats, "clock": arguments.clock, "instructions": instructions}
    write_result(arguments.output, config, samples, table=table, accuracy=accuracy)


if __name__ == "__main__":
    main()
