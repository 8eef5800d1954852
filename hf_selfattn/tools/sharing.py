"""What of a run goes to the Hub, and when: named files alone, without paths, tokens or data of this machine."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, create_repo
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from .safe_checkpoints import COMPLETE, MARKS
from .tokenizer import save_tokenizer

logger = logging.get_logger(__name__)

MODEL_FILES = (
    "*.py", "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template.jinja", "README.md",
    "training_curve.png", "*_results.json",
)  # fmt: skip
"""What makes a model. `training_args.bin` is not of it: the stock Trainer pickles paths, and the token, into it."""
CHECKPOINT_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth",
                    "trainer_state.json", "resume.json", "stream-*.json", COMPLETE)  # fmt: skip
"""What a run needs to go on, beside the model."""


def prepare_repository(arguments):
    """Make the repository of `--push_to_hub`, if it is not there, so that what stands against it is said at once.

    Raises:
        RuntimeError: no network, no login, no right to write there, a name that is none.
    """
    if not arguments.push_to_hub:
        return
    name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
    try:
        create_repo(name, token=arguments.hub_token, private=arguments.hub_private_repo, exist_ok=True)
    except Exception as error:  # the client's own errors, and those of the library below it
        raise RuntimeError(
            f"--push_to_hub: the repository {name!r} cannot be made or reached: {type(error).__name__}: {error}. "
            "Log in (`hf auth login`) and check --hub_model_id and the network; or leave --push_to_hub out and push "
            "the folder afterwards (model.push_to_hub)."
        ) from error


def _without_folders(value):
    """JSON with the last component in place of each absolute path; others stay."""
    if isinstance(value, dict):
        return {key: _without_folders(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_folders(x) for x in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def public_files(folder, to_resume=False):
    """{name in the repository: a Path, or bytes where that must not be as it is here}

    Args:
        folder: a saved model, or a checkpoint.
        to_resume: whether what is needed to go on with the run is of it.
    """
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_file())

    def among(patterns):
        return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]

    others = [name for name in names if name not in (*among(MODEL_FILES + CHECKPOINT_FILES), *MARKS)]
    if others:
        logger.info(f"not shared, being no part of a model: {', '.join(others)}")
    patterns = MODEL_FILES + CHECKPOINT_FILES if to_resume else MODEL_FILES
    found = {name: Path(folder, name) for name in among(patterns)}
    if "trainer_state.json" in found:
        state = _without_folders(json.loads(found["trainer_state.json"].read_text(encoding="utf-8")))
        found["trainer_state.json"] = (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
    if COMPLETE in found:
        entries = json.loads(found[COMPLETE].read_text(encoding="utf-8"))["files"]
        entries = {name: entry for name, entry in entries.items() if name in found}
        changed = {name: data for name, data in found.items() if isinstance(data, bytes)}
        entries |= {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                    for name, data in changed.items()}  # fmt: skip
        found[COMPLETE] = (json.dumps({"files": entries}, indent=2) + "\n").encode()
    return found


def _operations(files, inside=""):
    return [CommitOperationAdd(path_in_repo=inside + name, path_or_fileobj=data) for name, data in files.items()]


class _PushWhenSaved(TrainerCallback):
    """The stock Trainer pushes before a checkpoint is whole; this event comes after."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs):
        self.trainer.push_saved_checkpoint()


class HubPushes:
    """Mixin, before a Trainer: pushes are `public_files`, and a card written by `write_card` is not overwritten.

    Each push is one commit: the model in it is whole, and so is the checkpoint of `hub_strategy` 'checkpoint' and
    'all_checkpoints'. A push of a checkpoint runs while training goes on; the next one waits for it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._to_push = None
        self.add_callback(_PushWhenSaved(self))

    def create_model_card(self, *args, **kwargs):
        path = Path(self.args.output_dir, "README.md")
        if path.is_file() and "hf-selfattn" in (ModelCard.load(path).data.tags or []):
            return
        super().create_model_card(*args, **kwargs)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, private=None,
                    **kwargs):  # fmt: skip
        """As the stock Trainer's. Call it in all processes."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.processing_class is not None:
            save_tokenizer(self.processing_class, self.args.output_dir)
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        self._finish_current_push()
        return HfApi(token=token).create_commit(
            self.hub_model_id, _operations(public_files(self.args.output_dir)), commit_message=commit_message,
            revision=revision or self.args.hub_revision, run_as_future=not blocking)  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._finish_current_push()  # older checkpoints are deleted next: not under its hands
            self._to_push = Path(checkpoint_folder)

    def _finish_current_push(self):
        super()._finish_current_push()
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", None) or []
        for job in jobs:
            if job.exception() is not None:
                logger.warning(f"a push to {self.hub_model_id} failed, training goes on: {job.exception()}")
        if jobs:
            self.push_in_progress = None

    def push_saved_checkpoint(self):
        """Push the checkpoint that was saved last, in the background."""
        folder, self._to_push = self._to_push, None
        if folder is None:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        operations = _operations(public_files(folder))
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            inside = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            operations += _operations(public_files(folder, to_resume=True), f"{inside}/")
        job = HfApi(token=self.args.hub_token).create_commit(
            self.hub_model_id, operations, commit_message=f"Training in progress, step {self.state.global_step}",
            revision=self.args.hub_revision, run_as_future=True)  # fmt: skip
        self.push_in_progress = PushInProgress([job])
