"""PTE's member of PEFT's enum of methods.

PEFT's own way in, `register_peft_method`, asks for a member of `PeftType`; PEFT, transformers and TRL use it as one:
`.value`, `str()`, membership. PEFT offers nothing that adds one from outside, and Python closes an enum once it has
members; `_member_map_`, `_member_names_` and `_value2member_map_` are where the standard library looks them up.
"""

from peft.utils.peft_types import PeftType


def add_member(enum: type, name: str):
    """The member `name` of a string enum, whose value is its name; made if it is not there."""
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    setattr(enum, name, member)  # before it is in the map, where members cannot be set again
    enum._member_map_[name] = member
    enum._member_names_.append(name)
    enum._value2member_map_[name] = member
    return member


PTE = add_member(PeftType, "PTE")
