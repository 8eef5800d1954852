"""The stock Trainer on a stream, alone and in two processes: what it was trained on, counted, and resumed."""

import collections
import itertools
import json
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from torch import multiprocessing
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer, TrainingArguments

from hf_selfattn.tools.documents import Documents
from hf_selfattn.tools.streaming import StreamedRows, check_training
from hf_selfattn.tools.training import CheckedTrainer

from .processes import join_two
from .test_tools_documents import shards
from .test_tools_streaming import BATCH, BLOCK, LENGTH, SIZES, TEXTS, collator, loader, prepared, stream, with_ids
from .train_scripts import tiny_tokenizer


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return Documents(shards(tmp_path_factory.mktemp("shards"), "parquet", TEXTS, SIZES))


def model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model("selfattn", vocab_size=len(tiny_tokenizer()), pad_token_id=0, **sizes, **options)
    return AutoModelForMaskedLM.from_config(config)


class Reading(Trainer):
    """The stock Trainer on a stream; it notes what it is given."""

    def _get_dataloader(self, dataset, *args, **kwargs):
        return dataset.keep_whole(super()._get_dataloader(dataset, *args, **kwargs))

    def training_step(self, model, inputs, *args):
        self.seen = [*getattr(self, "seen", []), (inputs.pop("ids", None), inputs.pop("cursor"))]
        return super().training_step(model, inputs, *args)


def arguments(folder, **options):
    options = {"per_device_train_batch_size": BATCH, "max_steps": 20, "logging_steps": 1, "learning_rate": 1e-2,
               "remove_unused_columns": False, "use_cpu": True, "report_to": [], "save_strategy": "no",
               "disable_tqdm": True, "seed": 0, **options}  # fmt: skip
    found = TrainingArguments(str(folder), **options)
    check_training(found)
    return found


def train(rows, folder, **options):
    trainer = Reading(model(), arguments(folder, **options), train_dataset=rows,
                      data_collator=with_ids(collator(rows)), processing_class=tiny_tokenizer())  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_falls(documents, tmp_path, packing):
    trainer = train(stream(documents, packing=packing), tmp_path, max_steps=60)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 60
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert trainer.seen[-1][1]["epoch"] >= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_reads_what_the_stream_gives(documents, tmp_path, workers):
    """With gradient accumulation, through accelerate, which looks one batch ahead; and again from a cursor."""
    rows = stream(documents)
    expected = list(itertools.islice(loader(rows, workers, with_ids(collator(rows))), 18))
    expected = [(batch["ids"], batch["cursor"]) for batch in expected]
    options = {"gradient_accumulation_steps": 3, "dataloader_num_workers": workers}
    assert train(rows, tmp_path, max_steps=6, **options).seen == expected
    rows.restore({cursor["worker"]: cursor for _, cursor in expected[:9]})
    assert train(rows, tmp_path, max_steps=3, **options).seen == expected[9:]


@pytest.mark.parametrize(("workers", "packing", "save_steps"), [(0, True, 7), (2, True, 7), (2, False, 13)])
def test_a_resumed_training_ends_with_the_same_weights(documents, tmp_path, workers, packing, save_steps):
    """Bit for bit, from checkpoints in the first epoch and in the second, with dropout."""

    def run(folder, resume_from=None):
        rows = stream(documents, packing=packing)
        options = {"save_strategy": "steps", "save_steps": save_steps, "max_steps": 2 * save_steps + 3}
        trainer = CheckedTrainer(
            model(hidden_dropout=0.2),
            arguments(tmp_path / folder, gradient_accumulation_steps=2, dataloader_num_workers=workers, **options),
            train_dataset=rows,
            data_collator=collator(rows),
            processing_class=tiny_tokenizer(),
        )
        trainer.train(resume_from)
        return trainer.model.state_dict()

    whole = run("whole")
    for epoch, step in enumerate((save_steps, 2 * save_steps)):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        cursors = json.loads((folder / "stream-0.json").read_text())
        assert {cursor["epoch"] for cursor in cursors} == {epoch}
        again = run(f"from {step}", str(folder))
        assert all(torch.equal(again[name], weights) for name, weights in whole.items())


def _one_of_two(rank, port, folder, paths):
    join_two(rank, port)
    settings = arguments(folder, max_steps=12, gradient_accumulation_steps=2)  # joins the processes
    answers = {}
    for workers in (0, 2):
        rows = StreamedRows(Documents(paths), tiny_tokenizer(), LENGTH, BATCH, 3, BLOCK)
        assert (rows.process, rows.processes) == (rank, 2)
        with pytest.raises(ValueError, match=r"This stream is the part of one process, and accelerate's data loader"):
            next(iter(rows))
        settings.dataloader_num_workers = workers
        settings.dataloader_multiprocessing_context = "fork" if workers else None  # a spawned one imports for seconds
        trainer = Reading(model(), settings, train_dataset=rows, data_collator=with_ids(collator(rows)))
        prepared_loader = Trainer.get_train_dataloader(trainer)
        assert isinstance(prepared_loader.dataset, IterableDatasetShard)
        trainer.train()
        weights = sum(parameter.double().sum().item() for parameter in trainer.model.parameters())
        answers[workers] = {"seen": trainer.seen, "weights": weights}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(answers, file)
    torch.distributed.destroy_process_group()


def test_two_processes_read_everything_once(documents, tmp_path):
    """Two gloo processes through the stock Trainer: what they trained on, counted."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    paths = [file.name for file in documents.files]
    multiprocessing.spawn(_one_of_two, (port, str(tmp_path), paths), nprocs=2)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for workers in ("0", "2"):
        seen = [answer[workers]["seen"] for answer in answers]
        assert answers[0][workers]["weights"] == answers[1][workers]["weights"]
        assert [len(part) for part in seen] == [24, 24]
        times = collections.Counter(tuple(key) for part in seen for ids, _ in part for key in ids)
        assert set(times.values()) == {1}
        whole = min(max(cursor["epoch"] for _, cursor in part[-2:]) for part in seen)
        assert whole >= 1
        for epoch in range(whole if workers == "0" else whole - 1):
            assert sum(key[0] == epoch for key in times) == len(prepared())
        # and each process' part is that of a stream which is told its place
        for rank, part in enumerate(seen):
            rows = stream(documents, rank, 2)
            expected = itertools.islice(loader(rows, int(workers), with_ids(collator(rows))), 24)
            assert [[batch["ids"], batch["cursor"]] for batch in expected] == part


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_steps": -1}, r"training needs a number of steps, and --max_steps is not given. Pass it"),
            ({"accelerator_config": {"dispatch_batches": True}}, "not possible: .* dispatch_batches reads everything"),
            ({"accelerator_config": {"split_batches": True}}, "not possible: accelerator_config split_batches cuts"),
            ({"dataloader_in_order": False, "dataloader_num_workers": 1}, "in_order false lets batches overtake"),
        ],
    )
    def test_training_arguments(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **options)

    def test_data_parallel(self, tmp_path):
        settings = arguments(tmp_path)
        settings._n_gpu = 2
        with pytest.raises(ValueError, match="DataParallel on 2 GPUs cuts batches apart"):
            check_training(settings)

    def test_a_loader_that_reads_in_the_first_process(self, documents):
        prepared_loader = Accelerator(cpu=True).prepare(loader(stream(documents), 0))
        assert isinstance(prepared_loader, DataLoaderDispatcher)
        with pytest.raises(
            ValueError, match=r"A stream is read by each process itself, and accelerate's dispatch_batches"
        ):
            stream(documents).keep_whole(prepared_loader)
        loader_of_one = SimpleNamespace(dataset=documents)
        assert stream(documents).keep_whole(loader_of_one) is loader_of_one
