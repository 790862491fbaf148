"""PTE as a PEFT method: registered under the plain name "PTE", so that PEFT's own get, save and load know it."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.layer import PteAttention, PteLinear
from pte_trl.adapter.model import PteModel

PEFT_TYPE_TO_CONFIG_MAPPING["PTE"] = PteConfig
PEFT_TYPE_TO_TUNER_MAPPING["PTE"] = PteModel
PEFT_TYPE_TO_PREFIX_MAPPING["PTE"] = PteModel.prefix

__all__ = ["PteAttention", "PteConfig", "PteLinear", "PteModel"]
