"""Checks an adapter against the settings, and its files for completeness, before the base model's weights load.

config = check_adapter_folder(folder, model_config)          # a folder: its file against the model it is for
check_adapter(method, config, settings=..., model_config=...)  # any config: the method and the recipe's own keys
model = load_adapter(model, folder, is_trainable=True)       # the base model's weights are there: the adapter's too
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from pte_trl.adapter.fit import check_geometry, check_supported
from pte_trl.adapter.peft_type import PTE
from pte_trl.adapter.text_part import text_only
from pte_trl.compat.peft import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pte_trl.models.weights import without_memory

# A recipe's keys -> what PteConfig and LoraConfig call them, where it is something else.
PTE_NAMES = {"adapter_dropout": "dropout"}
LORA_NAMES = {"rank": "r", "alpha": "lora_alpha", "adapter_dropout": "lora_dropout"}
MISSING_WARNING = "Found missing adapter keys"  # PEFT's; a test holds it to that


def method_of(config: PeftConfig) -> str:
    """What kind of adapter it is: "pte", "lora", or the name in small letters of another PEFT method."""
    return getattr(config.peft_type, "value", str(config.peft_type)).lower()


def active_config(model: nn.Module) -> PeftConfig | None:
    """Of the adapter that a model runs with: a `PeftModel`, or one that transformers has put an adapter into."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    active = model.active_adapters
    active = active() if callable(active) else active
    return configs[active[0]] if active else None


def check_adapter(
    method: str,
    config: PeftConfig | None,
    *,
    settings: dict[str, Any] | None = None,
    model_config=None,
    source: str = "peft_config",
) -> None:
    """Refuses an adapter that is not what the method or the settings say.

    Args:
        method: "pte", "lora" or "lora_c".
        config: of the adapter that will be trained or used; None where there is none, as only `lora` may do: the
            reference of the bounded methods is the model with its adapter off.
        settings: the adapter's keys that were set on purpose (in the recipe or as flags), by the recipe's names; keys
            that are no setting of the adapter's kind are ignored.
        model_config: of the base model; compared with a PTE adapter's own.
        source: how the error names the adapter, for instance "adapter='outputs/qwen3b-pte'".

    Raises:
        ValueError: in one sentence, with the values of both sides.
    """
    if config is None:
        if method != "lora":  # which then trains the whole model, as TRL does
            kind = "PteConfig" if method == "pte" else "LoraConfig"
            raise ValueError(
                f"method={method!r}: there is no adapter; give a {kind} as peft_config, or a model that has such an "
                "adapter"
            )
        return
    found = method_of(config)
    if (found == "pte") != (method == "pte"):
        allowed = "'pte'" if found == "pte" else "'lora' or 'lora_c'"
        raise ValueError(f"method={method!r}: {source} is a {found.upper()} adapter, which takes method {allowed}")
    if config.is_prompt_learning and method == "lora_c":
        raise ValueError(f"method='lora_c': {source} is {found.upper()}, whose virtual tokens no window counts")
    _check_settings(config, settings or {}, source)
    if found == "pte" and model_config is not None:
        check_supported(model_config, "pte", config)
        check_geometry(config, model_config)


def _check_settings(config: PeftConfig, settings: dict[str, Any], source: str) -> None:
    names = PTE_NAMES if config.peft_type == PTE else LORA_NAMES
    differ = []
    for key, value in settings.items():
        name = names.get(key, key)
        if hasattr(config, name) and not _same(value, getattr(config, name)):
            differ.append(f"{key}={_shown(value)}, where the adapter has {_shown(getattr(config, name))}")
    if differ:
        raise ValueError(f"{'; '.join(differ)}: {source} was made with its own settings; leave these keys out")


def _same(wanted, found) -> bool:
    if isinstance(found, (list, tuple, set)) and isinstance(wanted, (list, tuple, set)):
        return set(wanted) == set(found)
    return wanted == found


def _shown(value) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)


def check_adapter_folder(folder: str | Path, model_config=None, trust_remote_code: bool = False) -> PeftConfig:
    """The configuration of the adapter in a folder, if its weights are all there, of the right shapes, and finite.

    Args:
        model_config: the configuration of the base model. Its adapter is built without memory (on the meta device) and
            its tensors' names and shapes are compared with the file's; None leaves that out.
        trust_remote_code: for a base model with code of its own.

    Raises:
        ValueError: in one sentence, with the folder and the first tensor that is wrong.
    """
    config = read_config(folder)
    found = _shapes_in_file(folder)
    if model_config is not None:
        if config.peft_type == PTE:
            check_supported(model_config, "pte", config)
            check_geometry(config, model_config)
        _compare(folder, found, *expected_shapes(config, model_config, trust_remote_code))
    _check_finite(folder)
    return config


def read_config(folder: str | Path) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        ValueError: no file, no JSON, no adapter, or one of an unknown kind.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"adapter={str(folder)!r}: needs {CONFIG_NAME}")
    try:
        held = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"adapter={str(folder)!r}: {CONFIG_NAME} is not JSON ({error})") from error
    kind = held.get("peft_type") if isinstance(held, dict) else None
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"adapter={str(folder)!r}: {CONFIG_NAME} has peft_type={kind!r}, which PEFT does not know")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"adapter={str(folder)!r}: {CONFIG_NAME}: {error}") from error


def expected_shapes(
    config: PeftConfig, model_config, trust_remote_code: bool = False, text_alone: bool = False
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Of an adapter on such a model: tensors and their shapes in its file, and the base model's own names.

    Args:
        text_alone: the adapter is made for a training on text (`text_only`).
    """
    config = copy.deepcopy(config)  # PEFT writes the model's name into it
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # shapes are the same, and an SVD needs weights
    with without_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings come when the weights load
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        # The base's vocabulary would have to be asked of the hub, so embeddings in the file are accepted by name.
        model = get_peft_model(model, text_only(config, model) if text_alone else config)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, set(model.state_dict())


def _weights(folder: str | Path):
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"adapter={str(folder)!r}: needs {SAFETENSORS_WEIGHTS_NAME}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter={str(folder)!r}: {SAFETENSORS_WEIGHTS_NAME} is damaged ({error})") from error


def _shapes_in_file(folder: str | Path) -> dict[str, tuple[int, ...]]:
    with _weights(folder) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}


def _compare(folder, found: dict[str, tuple], expected: dict[str, tuple], base: set[str]) -> None:
    where = f"adapter={str(folder)!r}: {SAFETENSORS_WEIGHTS_NAME}"
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} of the adapter's {len(expected)} tensors, first {missing[0]}")
    unknown = sorted(found.keys() - expected.keys() - base)
    if unknown:
        raise ValueError(f"{where} holds {len(unknown)} tensors that the model has no place for, first {unknown[0]}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has the shape {found[name]}; on this model it would be {shape}")


def _check_finite(folder: str | Path) -> None:
    with _weights(folder) as file:
        names = list(file.keys())
        bad = [name for name in names if not file.get_tensor(name).isfinite().all()]
    if bad:
        raise ValueError(
            f"adapter={str(folder)!r}: {len(bad)} of {len(names)} tensors hold NaN or infinity, first {bad[0]}"
        )


def load_adapter(model: nn.Module, folder: str | Path, *, is_trainable: bool = False, **kwargs) -> PeftModel:
    """`PeftModel.from_pretrained`, but an adapter with missing tensors is an error; PEFT warns and leaves random ones.

    Raises:
        ValueError: naming the folder and the tensors.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{MISSING_WARNING}")
        try:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, **kwargs)
        except UserWarning as warning:
            if MISSING_WARNING not in str(warning):
                raise
            raise ValueError(f"adapter={str(folder)!r}: is incomplete: {str(warning)[:400]}") from warning
