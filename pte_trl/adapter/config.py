"""What can be chosen about a PTE adapter."""

from dataclasses import dataclass, field, fields

from peft import PeftConfig

from pte_trl.adapter.peft_type import PTE
from pte_trl.adapter.settings import LINEARS, check_names, indices, integer, names, number, one_of

GEOMETRY = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass
class PteConfig(PeftConfig):
    """A PTE adapter: dW = alpha / rank * A S B on the named linear layers, S from the evicted tokens (eq. 4).

    Args:
        rank: r, width of the latent space (paper: 32).
        num_global_tokens: n_g, learnable global tokens per layer (paper: 32).
        alpha: the scale s is alpha / rank, as in LoRA.
        target_modules: which linear layers of every decoder layer are adapted: names, or "all-linear" for all seven.
            With k_proj or v_proj a replay has to walk the evictions one by one; without them all states come from one
            product.
        exclude_modules: linears of `target_modules` that are left alone: names, ends of full names, or one regular
            expression of full names, as in PEFT. A layer of which nothing is left has no S.
        layers_to_transform: the decoder layers that are adapted, a number or a list, from 0 on; None for all.
        modules_to_save: modules outside attention and MLP that are trained whole and saved with the adapter.
        dropout: on the input of the adapter. Above 0, log-probs in training are no longer those of the rollout.
        state_update: "recursive" (S <- Norm(S + S')), "sum" (S = Norm(S_0 + sum of S'), the paper's figure 2),
            "gated_sum" (the sum with a learned forget gate) or "delta" (a delta rule): `pte_trl.adapter.updates`.
        read: "row" (x A S B: keys are matched, values come out) or "column" (A S B x).
        normalisation: "rms" divides S by the root mean square of all its entries, "row" row by row.
        use_global_tokens: False is the paper's ablation global-0: S_0 = 0.
        encode_evicted: False is the ablation global-only: evictions leave S as it is.
        init_ratio: |S'| of one eviction over |S| at initialisation.
        whiten: learn the maps W^a on keys and values of unit second moments (pte_trl/adapter/calibration.py).
        centre: take the mean key and value of every kv head out of evicted tokens (the same).
        write_gate: multiply the value of an evicted token by a learned gate (pte_trl/adapter/encoder.py).
        state_per_head: a state for every kv head, each of an equal share of the global tokens (the same).
        geometry: shape of the model the adapter was made for; filled in, and compared on loading.

    Raises:
        ValueError: a value that is not allowed, or one of LoRA's settings that PTE does not have; it says why.
        TypeError: a name that neither has.
    """

    rank: int = 32
    num_global_tokens: int = 32
    alpha: float = 32.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "o_proj"])
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    dropout: float = 0.0
    state_update: str = "recursive"
    read: str = "row"
    normalisation: str = "rms"
    use_global_tokens: bool = True
    encode_evicted: bool = True
    init_ratio: float = 0.25
    whiten: bool = False
    centre: bool = False
    write_gate: bool = False
    state_per_head: bool = False
    geometry: dict | None = None

    def __new__(cls, *args, **kwargs):
        check_names(kwargs, {each.name for each in fields(cls)})
        return super().__new__(cls)

    def __post_init__(self):
        one_of("peft_type", self.peft_type, (None, PTE.value))
        one_of("task_type", self.task_type, (None, "CAUSAL_LM"))
        self.peft_type, self.task_type = PTE, "CAUSAL_LM"
        super().__post_init__()
        for key in ("rank", "num_global_tokens"):
            integer(key, getattr(self, key), 1)
        for key in ("alpha", "init_ratio"):
            number(key, getattr(self, key), "above 0", lambda x: x > 0)
        number("dropout", self.dropout, "of at least 0 and below 1", lambda x: 0 <= x < 1)
        one_of("state_update", self.state_update, ("recursive", "sum", "gated_sum", "delta"))
        one_of("read", self.read, ("row", "column"))
        one_of("normalisation", self.normalisation, ("rms", "row"))
        flags = ("use_global_tokens", "encode_evicted", "whiten", "centre", "write_gate", "state_per_head")
        for key in ("inference_mode", *flags):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r}: must be true or false")
        self._check_modules()
        if self.geometry is not None and (not isinstance(self.geometry, dict) or set(self.geometry) != set(GEOMETRY)):
            raise ValueError(f"geometry={self.geometry!r}: is filled in; must be None or have {', '.join(GEOMETRY)}")

    def _check_modules(self) -> None:
        if self.target_modules == "all-linear":
            self.target_modules = LINEARS
        self.target_modules = names("target_modules", self.target_modules)
        for name in self.target_modules:
            one_of("target_modules", name, LINEARS)
        if self.exclude_modules is not None and not (isinstance(self.exclude_modules, str) and self.exclude_modules):
            self.exclude_modules = names("exclude_modules", self.exclude_modules)
        if self.layers_to_transform is not None:
            self.layers_to_transform = indices("layers_to_transform", self.layers_to_transform)
        if self.modules_to_save is not None:
            self.modules_to_save = names("modules_to_save", self.modules_to_save)
