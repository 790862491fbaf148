"""What can be chosen about a PTE adapter."""

from dataclasses import dataclass, field

from peft import PeftConfig

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


def one_of(key: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value!r}: allowed are {', '.join(map(repr, allowed))}")


@dataclass
class PteConfig(PeftConfig):
    """A PTE adapter: dW = alpha / rank * A S B on the named linear layers, S from the evicted tokens (eq. 4).

    Args:
        rank: r, width of the latent space (paper: 32).
        num_global_tokens: n_g, learnable global tokens per layer (paper: 32).
        alpha: the scale s is alpha / rank, as in LoRA.
        target_modules: which linear layers of every decoder layer are adapted. With k_proj or v_proj a replay has
            to walk the evictions one by one; without them all states come from one product.
        dropout: on the input of the adapter. Above 0, log-probs in training are no longer those of the rollout.
        state_update: "recursive" (S <- Norm(S + S')) or "sum" (S = Norm(S_0 + sum of S'), the paper's figure 2).
        read: "row" (x A S B: keys are matched, values come out) or "column" (A S B x).
        normalisation: "rms" divides S by the root mean square of all its entries, "row" row by row.
        use_global_tokens: False is the paper's ablation global-0: S_0 = 0.
        encode_evicted: False is the ablation global-only: evictions leave S as it is.
        init_ratio: |S'| of one eviction over |S| at initialisation.
        whiten: learn the maps W^a on keys and values of unit second moments (pte_trl/adapter/calibration.py).
        geometry: shape of the model the adapter was made for; filled in, and compared on loading.
    """

    rank: int = 32
    num_global_tokens: int = 32
    alpha: float = 32.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "o_proj"])
    dropout: float = 0.0
    state_update: str = "recursive"
    read: str = "row"
    normalisation: str = "rms"
    use_global_tokens: bool = True
    encode_evicted: bool = True
    init_ratio: float = 0.25
    whiten: bool = False
    geometry: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "PTE"
        self.task_type = self.task_type or "CAUSAL_LM"
        for key in ("rank", "num_global_tokens"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key}={value!r}: must be an integer of at least 1")
        for key in ("alpha", "init_ratio"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)!r}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: must be at least 0 and below 1")
        one_of("state_update", self.state_update, ("recursive", "sum"))
        one_of("read", self.read, ("row", "column"))
        one_of("normalisation", self.normalisation, ("rms", "row"))
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(f"target_modules={self.target_modules!r}: must be a list with at least one name")
        for name in self.target_modules:
            one_of("target_modules", name, ATTENTION_LINEARS + MLP_LINEARS)
        self.target_modules = sorted(set(self.target_modules))
