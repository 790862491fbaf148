"""Sampling with vLLM, for an evaluation with the full cache: the base model, or LoRA on it.

A bounded cache cannot be had from it: vLLM keeps every token of a sequence in its pages, and one set of weights serves
the whole batch, while an eviction drops tokens and, in PTE, changes the adapter sample by sample.
"""

from accelerate import Accelerator
from peft import PeftConfig
from transformers import GenerationConfig

from pte_trl.compat.trl import is_vllm_available

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
WHY = (
    "vLLM keeps every token in its cache and has one set of weights for all sequences, while a bounded cache evicts "
    "and PTE's weights change with every eviction, sample by sample"
)


def check_vllm(args) -> None:
    """Refuses an evaluation that vLLM cannot do.

    Args:
        args: `EvaluationArguments` with backend="vllm".

    Raises:
        ValueError: a bounded cache, an eviction strategy, an adapter other than LoRA, or no vLLM.
    """
    for key, neutral in (("budget", None), ("window", None), ("eviction", "sliding_window")):
        if getattr(args, key) != neutral:
            raise ValueError(f"{key}={getattr(args, key)!r}: not with backend='vllm', {WHY}")
    if args.adapter is not None:
        kind = PeftConfig.from_pretrained(args.adapter).peft_type.value
        if kind != "LORA":
            raise ValueError(f"adapter={args.adapter!r}: is {kind}, backend='vllm' takes LORA: {WHY}")
    if not is_vllm_available():
        raise ValueError("backend='vllm': vLLM is not installed; pip install 'pte_trl[vllm]'")


def vllm_version() -> str:
    from vllm import __version__

    return __version__


class VllmSampler:
    """One engine of this process.

    Args:
        args: model, adapter, dtype and lengths, an `EvaluationArguments`.
        accelerator: where several processes run, each takes the GPU of its local rank.
        options: more for `vllm.LLM`.
    """

    def __init__(self, args, accelerator: Accelerator, **options):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.lora = None
        if args.adapter is not None:
            rank = PeftConfig.from_pretrained(args.adapter).r
            options |= {"enable_lora": True, "max_lora_rank": min(size for size in RANKS if size >= rank)}
            self.lora = LoRARequest("adapter", 1, args.adapter)
        options.setdefault("enforce_eager", accelerator.device.type == "cpu")  # compiling there takes minutes
        if accelerator.num_processes > 1:
            options |= {"distributed_executor_backend": "external_launcher"}
        self.engine = LLM(args.model_name_or_path, dtype=args.dtype, seed=args.seed, **options)
        try:
            self.generation_config = GenerationConfig.from_pretrained(args.model_name_or_path)
        except OSError:  # the model has none
            self.generation_config = None

    def generate(
        self,
        prompt_ids: list[list[int]],
        seeds: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        eos_token_ids: list[int],
    ) -> list[list[int]]:
        """Token ids of one completion per prompt, its end-of-sequence token included; arguments as for `rollout`."""
        from vllm import SamplingParams

        shared = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        shared |= {"stop_token_ids": eos_token_ids, "detokenize": False}
        outputs = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            [SamplingParams(seed=seed, **shared) for seed in seeds],
            lora_request=self.lora,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]
