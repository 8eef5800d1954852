"""What the tests of train/ and tools/ share: the scripts as modules, a small corpus, a small tokenizer and model."""

import functools
import importlib.util
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForMaskedLM

import hf_selfattn  # noqa: F401
from hf_selfattn.tools.tokenizer import save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48"

SUBJECTS = ["the cat", "a small dog", "our neighbour", "the old teacher", "my friend", "一个学生", "这只猫"]
VERBS = ["likes", "sees", "never forgets", "is looking for", "喜欢", "看见"]
OBJECTS = ["green apples", "the long road", "music", "books about whales", "苹果", "音乐和书", "something naïve"]


def sentences(count, seed=0):
    """`count` sentences of a small grammar, English and Chinese mixed."""
    draw = random.Random(seed)
    return [f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}, {draw.randrange(100)}."
            for _ in range(count)]  # fmt: skip


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path, texts):
    Path(path).write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return str(path)


@functools.cache
def script(name):
    """train/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / "train" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def environment():
    """For a script in a process of its own: this package, one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def tiny_tokenizer():
    return train_tokenizer(sentences(300), vocab_size=420, progress=False)


@functools.cache
def tiny_tokenizer_folder():
    folder = tempfile.mkdtemp(prefix="tokenizer")
    save_tokenizer(tiny_tokenizer(), folder)
    return folder


@functools.cache
def tiny_model_folder():
    """A saved masked language model with its tokenizer. Tests copy it before they change it."""
    folder = tempfile.mkdtemp(prefix="model")
    config = AutoConfig.for_model("selfattn", vocab_size=len(tiny_tokenizer()), pad_token_id=0, hidden_size=32,
                                  num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    return folder
