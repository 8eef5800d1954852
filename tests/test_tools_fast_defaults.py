import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_selfattn.tools import fast_defaults, training
from hf_selfattn.tools.collators import MaskingCollator
from hf_selfattn.tools.fast_defaults import bf16_in_hardware, log_kernel
from hf_selfattn.tools.training import CheckedTrainer, ScriptArguments, start_logging

from .test_tools_training import text_rows
from .train_scripts import tiny_model_folder, tiny_tokenizer


@pytest.fixture
def machine(monkeypatch):
    """A machine without an accelerator, whose CPU multiplies bf16 or not."""

    def make(amx=False, avx512=False):
        monkeypatch.setattr(training, "accelerator_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)

    return make


@pytest.mark.parametrize(
    ("units", "why"), [({"amx": True}, "by AMX"), ({"avx512": True}, "by AVX-512"), ({}, "neither AMX nor AVX-512")]
)
@pytest.mark.parametrize("use_cpu", [True, False])
def test_bf16_is_the_default_where_the_cpu_multiplies_it(tmp_path, machine, units, why, use_cpu):
    machine(**units)
    arguments = ScriptArguments(str(tmp_path), use_cpu=use_cpu)
    assert arguments.bf16 == bool(units)
    assert arguments.use_cpu == (use_cpu or bool(units))
    precision = "bf16 mixed" if units else "fp32"
    assert arguments.remarks[0].startswith(f"precision: {precision} (the CPU multiplies ")
    assert why in arguments.remarks[0]


def test_what_was_asked_for_is_obeyed(tmp_path, machine):
    machine(amx=True)
    assert not ScriptArguments(str(tmp_path), bf16=False).bf16
    assert ScriptArguments(str(tmp_path), bf16=False).remarks[0] == "precision: fp32 (as asked)"
    machine()
    arguments = ScriptArguments(str(tmp_path), bf16=True, optim="adafactor")
    assert arguments.bf16
    assert arguments.use_cpu
    assert arguments.remarks == [
        "precision: bf16 mixed (as asked)",
        "There is no accelerator: bf16 runs on the CPU (use_cpu is set).",
        "optimizer: adafactor, as asked",
    ]


@pytest.mark.parametrize("able", [True, False])
def test_bf16_that_a_gpu_emulates_is_not_the_default(monkeypatch, able):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able or including_emulation)
    assert bf16_in_hardware(on_cpu=False) == (able, f"Old T4 multiplies {'' if able else 'no '}bf16")


def test_another_accelerator_says_itself_what_it_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fast_defaults, "is_torch_bf16_gpu_available", lambda: True)
    assert bf16_in_hardware(on_cpu=False) == (True, "the accelerator multiplies bf16")


def test_the_log_says_what_was_decided(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(training, "keep_memory", lambda: "memory: kept")
    arguments = ScriptArguments(str(tmp_path), bf16=False, use_cpu=True)
    with caplog.at_level(logging.INFO):
        start_logging(arguments)
    assert caplog.messages == [
        "precision: fp32 (as asked)",
        "optimizer: adamw_torch_fused, the Trainer's default: one pass over the weights",
        "memory: kept",
    ]


def kernel_said(monkeypatch, config, arguments, asked=None):
    said = []
    monkeypatch.setattr(fast_defaults.logger, "info", said.append)
    log_kernel(config, arguments, asked)
    (line,) = said
    return line


def test_the_log_names_the_kernel_and_why(tmp_path, monkeypatch):
    arguments = ScriptArguments(str(tmp_path), bf16=False, use_cpu=True)
    config = AutoConfig.for_model("selfattn", num_hidden_layers=4, score_function="additive")
    config._attn_implementation = "selfattn"
    line = kernel_said(monkeypatch, config, arguments)
    assert line.startswith("attention: selfattn in all 4 layers (cpu, float32; the default for this configuration; ")
    assert "; sdpa cannot: score_function 'additive' is not a dot product" in line
    assert "eager cannot" not in line
    bert = AutoConfig.for_model("bert", num_hidden_layers=1)
    bert._attn_implementation = "sdpa"
    assert kernel_said(monkeypatch, bert, arguments, "sdpa") == "attention: sdpa in 1 layer (cpu, float32; as asked)"


def test_the_optimizer_is_the_fused_one(tmp_path):
    trainer = make_trainer(tmp_path)
    assert type(trainer.create_optimizer()).__name__.endswith("AdamW")
    assert trainer.optimizer.defaults["fused"]


def make_trainer(folder, **options):
    return CheckedTrainer(
        model=AutoModelForMaskedLM.from_pretrained(tiny_model_folder()),
        args=ScriptArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options),
        train_dataset=text_rows(),
        eval_dataset=text_rows(),
        data_collator=MaskingCollator(tiny_tokenizer(), 0.5),
    )


def test_bf16_does_not_change_what_an_evaluation_says(tmp_path):
    exact, mixed = (make_trainer(tmp_path, bf16=bf16).evaluate()["eval_loss"] for bf16 in (False, True))
    assert mixed == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("system", "libc", "accelerator", "is_kept"),
    [("Linux", "glibc", False, True), ("Linux", "musl", False, False), ("Darwin", "", False, False),
     ("Linux", "glibc", True, False)],
)  # fmt: skip
def test_freed_memory_is_kept_where_glibc_can(system, libc, accelerator, is_kept, monkeypatch):
    """M_TRIM_THRESHOLD (-1) as large as it may be, M_MMAP_MAX (-4) 0; nothing elsewhere, and the log says it."""
    told = []
    library = SimpleNamespace(mallopt=lambda *number: told.append(number))
    monkeypatch.setattr(fast_defaults.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(fast_defaults.platform, "system", lambda: system)
    monkeypatch.setattr(fast_defaults.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(fast_defaults, "accelerator_available", lambda: accelerator)
    line = fast_defaults.keep_memory()
    assert told == ([(-1, 2**31 - 1), (-4, 0)] if is_kept else [])
    assert (line is not None) == is_kept
