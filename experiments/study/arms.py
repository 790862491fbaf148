"""The arms of a study, in the order in which they are shown."""

# The order of the rows; an arm that is not named comes last.
ORDER = (
    *("default", "base", "lora", "lora_c", "pte"),
    *("lora_c_distilled", "pte_distilled", "lora_c_distilled_grpo", "pte_distilled_grpo"),
)


def ordered(arms) -> list[str]:
    return sorted(arms, key=lambda arm: (ORDER.index(arm) if arm in ORDER else len(ORDER), arm))
