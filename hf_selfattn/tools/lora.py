"""PEFT's defaults for our models: where an adapter goes when its configuration does not say."""

import re

from ..configuration_selfattn import SelfAttnConfig

_TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+)_MODULES_MAPPING")


def register_peft_targets() -> dict[str, list[str] | str]:
    """Enters our model type into PEFT's tables of default target modules, for every method that has one.

    Then `LoraConfig(task_type="SEQ_CLS")` is enough. Our projections are called as Llama's are, and each method takes
    what PEFT chose for that: LoRA and its relatives query and value (Hu et al. 2021, arXiv:2106.09685, section 7.1),
    (IA)^3 key, value and the inner activations of the feed-forward (Liu et al. 2022, arXiv:2205.05638, section 3.3),
    OSF every projection. Not the tuning of norms: which of them there are depends on `norm_position`. Called again it
    changes nothing, and an entry that is there already stays.

    Returns:
        For each method, as its table is named ("LORA_TARGET", "IA3_FEEDFORWARD"), the modules that it takes now.

    Raises:
        ImportError: if peft is not installed.
    """
    try:
        from peft.utils import constants
    except ImportError as error:
        raise ImportError(
            "register_peft_targets writes into tables of peft, and peft is not installed here. Run: pip install peft"
        ) from error
    registered = {}
    for name, table in vars(constants).items():
        method = _TABLE.fullmatch(name)
        if method is not None and method[1] != "LNTUNING_TARGET" and "llama" in table:
            registered[method[1]] = table.setdefault(SelfAttnConfig.model_type, list(table["llama"]))
    return registered
