"""Private names of PEFT."""

from peft.tuners.lora import Linear as LoraLinear  # a linear with LoRA; a variant or another method has another class
from peft.tuners.tuners_utils import check_target_module_exists  # which linears a config adapts, by PEFT's own rules
from peft.utils import (
    CONFIG_NAME,  # file of an adapter's configuration in its folder
    SAFETENSORS_WEIGHTS_NAME,  # file of its weights
    ModulesToSaveWrapper,  # what stands for a module of `modules_to_save`; `original_module` is the base model's
    register_peft_method,  # PEFT's own way in: get, save and load then know the method by its name
)

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "LoraLinear",
    "ModulesToSaveWrapper",
    "add_member",
    "check_target_module_exists",
    "register_peft_method",
]


def add_member(enum: type, name: str):
    """The member `name` of a string enum, whose value is its name; made if it is not there.

    `register_peft_method` asks for a member of `PeftType`, and PEFT, transformers and TRL use it as one: `.value`,
    `str()`, membership. PEFT offers nothing that adds one from outside, and Python closes an enum once it has members;
    `_member_map_`, `_member_names_` and `_value2member_map_` are where the standard library looks them up.
    """
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    setattr(enum, name, member)  # before it is in the map, where members cannot be set again
    enum._member_map_[name] = member
    enum._member_names_.append(name)
    enum._value2member_map_[name] = member
    return member
