"""What reading a new token costs with a memory of the text before it, and without.

    OMP_NUM_THREADS=1 python benchmarks/memory_cost.py

A causal encoder with a window has read N tokens and reads S more. With memory it reads S tokens, without it N + S.
Both give the same numbers for the S tokens (checked here). One thread, alternating, medians.
"""

import argparse
from pathlib import Path

import torch
from measure import alternate, medians, write_result

from hf_selfattn import SelfAttnConfig, SelfAttnModel

OPTIONS = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "attention_bias": False,
    "hidden_act": "gelu",
    "causal": True,
    "attention_pattern": "sliding_window",
    "window_radius": 256,
    "memory_length": 256,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory_cost.json"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = SelfAttnModel(SelfAttnConfig(**OPTIONS)).eval()
    samples = {}
    for read in arguments.read:
        tokens = torch.randint(0, 1000, (1, read + arguments.segment))
        before, new = tokens.split([read, arguments.segment], dim=1)
        memory = model(before).memory
        with_memory, without = model(new, memory=memory), model(tokens)
        torch.testing.assert_close(
            with_memory.last_hidden_state, without.last_hidden_state[:, read:], atol=1e-5, rtol=1e-5
        )
        steps = {
            f"with memory | {read}": lambda new=new, memory=memory: model(new, memory=memory),
            f"without | {read}": lambda tokens=tokens: model(tokens),
        }
        samples |= alternate(steps, arguments.repeats)
        found = medians(samples)
        per_token = [found[name] * 1e6 / arguments.segment for name in steps]
        print(f"{read:6} tokens read: {per_token[0]:8.0f} µs a new token with memory, {per_token[1]:8.0f} without")
    write_result(arguments.output, {"options": OPTIONS, "segment": arguments.segment}, samples)


if __name__ == "__main__":
    main()
