"""One tiny random model of every decoder that transformers has: the table that `tests/test_zoo.py` walks.

A new architecture is a line of `ZOO`: what its configuration needs beyond `TINY`, and what is expected of it. A model
type of transformers that is neither here nor in `NOT_TRIED` fails a test by name.
"""

from dataclasses import dataclass, field, fields

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

F, S, C, L, H = "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "hybrid"
# Values by the name of a configuration's field; each configuration takes those it has a field for.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    # multi-head latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    # recurrent layers; a chunk is shorter than the prompts
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "mamba_d_ssm": 64,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 4,
}
MIXED = {"layer_types": [S, F, S], "sliding_window": 5}  # shorter than the prompts and than W
ALL_FULL = {"sliding_window": None}
HYBRID = {"layer_types": [L, F, L]}
LATENT = {"num_key_value_heads": 4}  # as many as queries
DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 48},
}
EXACT = 1e-9


@dataclass(frozen=True)
class Row:
    """An architecture.

    Attributes:
        model_type: as transformers' registry names it.
        config: over `TINY`.
        bound: the largest difference of a log-prob allowed, in a float64 model.
        refused: what must be refused, with words of the sentence: "bare", "pte", "segments".
        dtype: of the weights, where float64 does not run.
        attention: attention implementation.
        variant: what is different, where an architecture has several rows.
    """

    model_type: str
    config: dict
    bound: float = EXACT
    refused: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    attention: str = "sdpa"
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type} {self.variant}".strip()

    def words_of_refusal(self, view: str, arm: str) -> str | None:
        """Words of the sentence by which a cell must be refused; None if it must pass."""
        kinds = ("bare", *(("pte",) if arm.startswith("pte") else ()), arm, view)
        return next((self.refused[kind] for kind in kinds if kind in self.refused), None)


def row(model_type: str, bound=EXACT, refused=None, dtype=torch.float64, attention="sdpa", variant="", **config):
    return Row(model_type, config, bound, refused or {}, dtype, attention, variant)


NO_PLACE = {"pte": "finds no attention"}
NOT_PASSED_ON = {"pte": "hand no keyword arguments on to their attention"}
UNKNOWN_TYPE = {"bare": "layer types .* a bounded cache takes"}
NO_FULL_LAYER = {"bare": "a bounded cache evicts from layers of full attention"}
FORGETS = {"segments": "from an empty state", "chunks": "from an empty state"}
IN_PLACE = {"gradient": "states in place"}
SHARED = {"pte": "PTE takes a module for each"}
HETEROGENEOUS = {"bare": "of its layers differ"}
# Keys, values and inputs pass through convolutions with a state each, which sliding layers have as well.
STATES_IN_A_LAYER = {"bare": "gives other log-probs|cannot be decoded and replayed"}
SHARED_KEYS = {"bare": "num_kv_shared_layers"}

ROWS = [
    # -- every layer attends in full -----------------------------------------------------------------------------
    row("llama"),
    row("qwen2"),
    row("qwen3"),
    row("mistral", **ALL_FULL),
    row("apertus"),
    row("arcee"),
    row("aria_text"),
    row("bitnet"),
    row("cohere", logit_scale=1.0),
    row("diffllama"),
    row("dots1", n_shared_experts=1),
    row("doge"),
    row("ernie4_5"),
    row("ernie4_5_moe"),
    row("flex_olmo"),
    row("gemma"),
    row("glm"),
    row("glm4"),
    row("glm4_moe"),
    row("granite"),
    row("granitemoe"),
    row("granitemoeshared"),
    row("helium"),
    row("hunyuan_v1_dense"),
    row("hunyuan_v1_moe"),
    row("hy_v3"),
    row("hyperclovax"),
    row("jais2"),
    row("ministral3", **ALL_FULL),
    row("minimax_m3_vl_text"),
    row("minimax_m2"),
    row("mixtral", **ALL_FULL),
    row("nanochat"),
    row("olmo"),
    row("olmo2"),
    row("olmoe"),
    row("persimmon", refused=NO_PLACE),
    row("phi"),
    row("phi3", **ALL_FULL),
    row("phimoe", **ALL_FULL),
    row("qwen2_moe"),
    row("qwen3_moe"),
    row("seed_oss"),
    row("smollm3", no_rope_layers=[1, 0, 1]),
    row("solar_open"),
    row("starcoder2", **ALL_FULL),
    # -- latent attention ----------------------------------------------------------------------------------------
    row("axk1", **LATENT),
    row("deepseek_v2", **LATENT),
    row("deepseek_v3", **LATENT),
    row("glm4_moe_lite", **LATENT),
    row("longcat_flash", num_layers=2, num_hidden_layers=4, zero_expert_num=1, head_dim=4, num_key_value_heads=4),
    row("minicpm3", num_key_value_heads=4, scale_emb=1),
    row("youtu", **LATENT),
    # -- layers with a window of their own -----------------------------------------------------------------------
    row("afmoe", **MIXED),
    row("cohere2", logit_scale=1.0, **MIXED),
    row("cohere2_moe", logit_scale=1.0, **MIXED),
    row("cwm", **MIXED),
    row("exaone4", **MIXED),
    row("exaone_moe", **MIXED),
    row("gemma2", attention="eager", **MIXED),
    row("gemma3_text", **MIXED),
    row("gemma3n_text", layer_types=[S, F, S], sliding_window=5, num_kv_shared_layers=0),
    row("gemma3n_text", variant="with shared keys", refused=SHARED_KEYS, num_kv_shared_layers=1, **MIXED),
    row("gemma4_text", refused=HETEROGENEOUS, layer_types=[S, S, F], sliding_window=5, global_head_dim=16),
    row("gemma4_text", variant="with shared keys", refused=SHARED_KEYS, num_kv_shared_layers=1, layer_types=[S, F, F]),
    row("gpt_oss", attention="eager", **MIXED),
    row("granite_swa", attention="eager", **MIXED),
    row("granitemoe_swa", attention="eager", **MIXED),
    row("laguna", **MIXED),
    row("mellum", **MIXED),
    row("mimo_v2_flash", attention="eager", **MIXED),
    row("ministral", **MIXED),
    row("modernbert-decoder", refused=NO_PLACE, layer_types=[S, F, S], local_attention=10),
    row("olmo3", **MIXED),
    row("vaultgemma", attention="eager", **MIXED),
    row("llama4_text", layer_types=[F, F, F], no_rope_layers=[1, 0, 1]),
    # -- recurrent layers beside attention -----------------------------------------------------------------------
    row("bamba", attn_layer_indices=[1]),
    row("falcon_h1"),
    row("granitemoehybrid", **HYBRID),
    row("jamba", refused=FORGETS | IN_PLACE, attn_layer_period=3, attn_layer_offset=1),
    row("kimi_linear", num_key_value_heads=4, linear_num_heads=4, linear_head_dim=8, **HYBRID),
    row("lfm2", layer_types=["conv", F, "conv"]),
    row("lfm2_moe", layer_types=["conv", F, "conv"], num_dense_layers=1),
    row("nemotron_h", layers_block_type=[L, "moe", F, "mlp"]),
    row("olmo_hybrid", **HYBRID),
    row("qwen3_5_text", **HYBRID),
    row("qwen3_5_moe_text", **HYBRID),
    row("qwen3_next", **HYBRID),
    row("zamba", refused=NO_PLACE | FORGETS, num_hidden_layers=4, layers_block_type=[L, H, L, H]),
    row("zamba2", refused=NO_PLACE, mamba_d_state=8, num_hidden_layers=4, layers_block_type=[L, H, L, H]),
    # Pieces are right in Zaya: its state is its last input, which `takes_up_states` takes for a forgotten one.
    row("zaya", refused={"pte": "PTE adapts torch.nn.Linear alone"} | FORGETS, num_experts_per_tok=1),
    # -- refused -------------------------------------------------------------------------------------------------
    row("stablelm", refused=NOT_PASSED_ON),
    row("nemotron", refused=NOT_PASSED_ON),
    row("gpt_neox", refused=NO_PLACE),
    row("falcon", refused=NO_PLACE),
    row("gpt2", refused=NO_PLACE, n_embd=32, n_layer=3, n_head=4),
    row("minimax", refused={"bare": "uses cache of its own"}, layer_types=[F, L, F]),
    row("dbrx", refused=NO_PLACE, d_model=32, n_heads=4, n_layers=3, **DBRX),
    row("deepseek_v32", refused=UNKNOWN_TYPE, num_key_value_heads=4, index_topk=4, index_n_heads=2, index_head_dim=8),
    row("deepseek_v4", refused=UNKNOWN_TYPE, attention="eager"),
    row("glm_moe_dsa", refused=UNKNOWN_TYPE, num_key_value_heads=4, index_topk=4, index_n_heads=2, index_head_dim=8),
    row("axk2", refused=UNKNOWN_TYPE, num_key_value_heads=4, index_topk=4, index_n_heads=2, index_head_dim=8),
    row("hy_v4", refused=UNKNOWN_TYPE, attention="eager"),
    row("qwen4_exp_text", refused=UNKNOWN_TYPE, layer_types=[L, "qwen_sparse_attention", L]),
    row("inkling_text", refused=STATES_IN_A_LAYER, local_layer_ids=[0, 2], sliding_window_size=5),
    row("hrm_text", refused=SHARED, num_hidden_layers=1, H_cycles=1, L_cycles=1),
    row("jetmoe", refused=NO_PLACE, kv_channels=8),
    row("mamba", refused=NO_FULL_LAYER, attention="eager", state_size=8),
    row("mamba2", refused=NO_FULL_LAYER, attention="eager", num_heads=8),
    row("recurrent_gemma", refused=NO_FULL_LAYER),
]
ZOO = {row.name: row for row in ROWS}

# Model types that are left out, by reason. A new one belongs into the table unless one of these is true of it.
NOT_TRIED = {
    "an encoder, or the decoder of an encoder-decoder": """
        bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert cohere_compass_text
        data2vec-text electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet reformer rembert roberta
        roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod""",
    "no instruction-tuned model of the size of a reasoning model": """
        biogpt bloom codegen cpmant ctrl gpt-sw3 gpt_bigcode gpt_neo gpt_neox_japanese gptj mpt openai-gpt opt
        xglm""",
    "reads bytes, images or sound beside text": """
        blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified gemma4_unified_text git got_ocr2 llama4 mllama moshi
        musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp""",
    "drafts for another model": "gemma4_assistant gemma4_unified_assistant",
    "no attention at all": "falcon_mamba rwkv xlstm",
}


def registered() -> list[str]:
    """Model types of transformers' causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of_row(row: Row):
    made = CONFIG_MAPPING[row.model_type]
    known = {f.name for f in fields(made)} | set(getattr(made, "attribute_map", {}))
    return made(**{name: value for name, value in TINY.items() if name in known} | row.config)


def tiny_of(row: Row, attention: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The row's model, with random weights of a scale at which the net is not chaotic."""
    config = config_of_row(row)
    config._attn_implementation = attention or row.attention
    config._experts_implementation = "eager"  # the grouped kernel takes no float64
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype or row.dtype).eval()
    scale_weights(model)
    return model


@torch.no_grad()
def scale_weights(model: nn.Module) -> None:
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and parameter.dim() == 1:
            parameter.uniform_(0.8, 1.2)
        else:
            parameter.normal_(std=1.0 if id(parameter) in embeddings else 0.15)
