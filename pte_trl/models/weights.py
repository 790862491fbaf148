"""Checks that a model's folder is complete: by its headers before weights load, by what was loaded afterwards.

    check_model_folder("outputs/base")      # seconds, whatever the size
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    check_loaded(info, "outputs/base")

transformers fills what is missing in a checkpoint with random numbers and says so in a log line.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, CONFIG_NAME, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pte_trl.compat.transformers import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    set_zero3_state,
    tied_weights,
)

MAX_HEADER = 100_000_000  # bytes, as in safetensors itself
# Bytes of an element; of the others the size is not compared.
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def check_model_folder(name_or_path: str, trust_remote_code: bool = False, key: str = "model_name_or_path") -> None:
    """Configuration, files, headers and shapes of a local folder; a name on the hub is left to the download.

    Args:
        name_or_path: a folder, or a name on the hub, of which nothing is read.
        trust_remote_code: as for loading; a model with code of its own is not built, so its shapes are not compared.
        key: the setting that names it, for errors.

    Raises:
        ValueError: a file that is missing, cut short or damaged, or tensors that are missing or of another shape
            than the configuration says; names file and tensor.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return
    setting = f"{key}={str(name_or_path)!r}"
    config = read_config(folder, setting, trust_remote_code)
    files = weight_files(folder, setting)
    shapes = {}
    for file in files:
        if file.suffix == ".safetensors":
            for tensor, shape in read_shapes(file, setting).items():
                shapes[tensor] = shape
        elif not file.stat().st_size:
            raise ValueError(f"{setting}: {file.name} is empty")
    if all(file.suffix == ".safetensors" for file in files) and not has_own_code(config):
        check_shapes(config, shapes, setting)


def read_config(folder: Path, setting: str, trust_remote_code: bool) -> PreTrainedConfig:
    """config.json, as transformers reads it."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{setting}: holds no {CONFIG_NAME}; holds {listing(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{setting}: {CONFIG_NAME} is not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str) or not content["model_type"]:
        raise ValueError(f"{setting}: {CONFIG_NAME} names no model_type, so nobody can tell which architecture it is")
    if "auto_map" in content and not trust_remote_code and content["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{setting}: comes with Python code of its own, which is run only with trust_remote_code: true"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration class may raise anything on values it does not expect
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{setting}: {CONFIG_NAME} cannot be used ({type(error).__name__}: {why})") from error


def has_own_code(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "auto_map", None)) or getattr(config, "quantization_config", None) is not None


def listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"


def weight_files(folder: Path, setting: str) -> list[Path]:
    """The files that transformers will load, in its order of preference."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return indexed_files(folder, index, setting)
    raise ValueError(
        f"{setting}: holds no weights ({SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its parts); "
        f"holds {listing(folder)}"
    )


def indexed_files(folder: Path, index: str, setting: str) -> list[Path]:
    """The parts that an index names; each tensor is in the part that it names for it."""
    try:
        content = json.loads((folder / index).read_text(encoding="utf-8"))
        places = {str(tensor): str(part) for tensor, part in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{setting}: {index} is damaged ({type(error).__name__}: {error})") from error
    parts = sorted(set(places.values()))
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing or not parts:
        raise ValueError(
            f"{setting}: {index} names {len(parts)} files, of which {len(missing)} are missing"
            + (f" ({', '.join(missing[:3])})" if missing else "")
        )
    for part in parts:
        if part.endswith(".safetensors"):
            found = read_shapes(folder / part, setting)
            lacking = [tensor for tensor, place in places.items() if place == part and tensor not in found]
            if lacking:
                raise ValueError(f"{setting}: {part} lacks {first(lacking)}, which {index} says it holds")
    return [folder / part for part in parts]


def read_shapes(file: Path, setting: str) -> dict[str, list[int]]:
    """The shapes in a safetensors file, by its header: eight bytes of length, then JSON, then the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{setting}: {file.name} is cut short, or no safetensors file ({size} bytes)")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        shapes = {tensor: list(entry["shape"]) for tensor, entry in header.items()}
        ends = {tensor: entry["data_offsets"] for tensor, entry in header.items()}
        for tensor, (begin, end) in ends.items():
            width = SIZES.get(header[tensor]["dtype"])
            if width and end - begin != width * int(torch.Size(shapes[tensor]).numel()):
                raise ValueError(f"{tensor} has {end - begin} bytes for shape {shapes[tensor]}")
        last = max((end for _, end in ends.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{setting}: the header of {file.name} is damaged ({error})") from error
    if size != 8 + length + last:
        what = "cut short" if size < 8 + length + last else "longer than its header says"
        raise ValueError(f"{setting}: {file.name} is {what}: {size} bytes instead of {8 + length + last}")
    return shapes


@contextmanager
def without_memory() -> Iterator[None]:
    """Models are built on the meta device, under ZeRO-3 too, which would divide the weights that are not there.

    Random numbers are left as they were: a result that is kept would change what a run draws afterwards.
    """
    with torch.device("meta"), set_zero3_state(), torch.random.fork_rng(devices=[]):
        yield


def check_shapes(config: PreTrainedConfig, found: dict[str, list[int]], setting: str) -> None:
    """Names and shapes in the files against those of the model that the configuration describes.

    The model is built without memory. Of tensors that the model ties, one is enough. Names are compared as they
    are, and with the prefix of the base model, which some checkpoints leave out. Names that the model does not know
    transformers may convert while loading: where there are such, what is missing is left to `check_loaded`.
    """
    try:
        with without_memory():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's class may raise anything on a configuration that makes no sense
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{setting}: no model can be built from {CONFIG_NAME} ({why})") from error
    prefix = f"{model.base_model_prefix}."
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name if name in wanted else prefix + name: shape for name, shape in found.items()}
    for name, shape in found.items():
        if name in wanted and shape != wanted[name]:
            raise ValueError(f"{setting}: {name} has shape {shape}, {CONFIG_NAME} says {wanted[name]}")
    tied = tied_weights(model)
    tied |= {source: target for target, source in tied.items()}
    missing = [name for name in wanted if name not in found and tied.get(name) not in found]
    if missing and not set(found) - set(wanted):
        raise ValueError(
            f"{setting}: its weights lack {first(missing)} of {len(wanted)} tensors that {CONFIG_NAME} says there are"
        )


def check_loaded(info: dict, name_or_path: str, key: str = "model_name_or_path") -> None:
    """What `from_pretrained(..., output_loading_info=True)` reports: every tensor must have come from the checkpoint.

    Raises:
        ValueError: tensors were missing, of another shape, could not be converted, or are no part of the model.
    """
    faults = []
    for kind, what in (
        ("missing_keys", "are missing and would be random"),
        ("mismatched_keys", "have another shape than the configuration says"),
        ("unexpected_keys", "are no part of the model"),
        ("error_msgs", "could not be loaded"),
    ):
        names = [name if isinstance(name, str) else str(name[0]) for name in info.get(kind) or ()]
        if names:
            faults.append(f"{first(sorted(names))} {what}")
    if faults:
        raise ValueError(f"{key}={name_or_path!r}: of its weights {'; '.join(faults)}")


def first(names: Iterable[str], count: int = 3) -> str:
    """How many, and the first few."""
    names = list(names)
    return f"{len(names)} ({', '.join(names[:count])}{', ...' if len(names) > count else ''})"
