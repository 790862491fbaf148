"""PTE's member of PEFT's enum of methods."""

from peft import PeftType

from pte_trl.compat.peft import add_member

PTE = add_member(PeftType, "PTE")
