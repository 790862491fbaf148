"""PTE as a PEFT method: registered with PEFT under the name PTE, so that its own get, save and load know it."""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.config import PteConfig
from pte_trl.adapter.layer import PteLinear
from pte_trl.adapter.model import PteModel
from pte_trl.adapter.peft_type import PTE
from pte_trl.compat.peft import register_peft_method

if PTE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PTE.value.lower(), config_cls=PteConfig, model_cls=PteModel, prefix=PteModel.prefix)

__all__ = ["PteAttention", "PteConfig", "PteLinear", "PteModel"]
