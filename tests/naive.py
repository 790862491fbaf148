"""A third implementation of METHOD, slow and plain: one sample, one token at a time, lists of keys and values.

It shares no code with the package: weights come out of the model's state dict by name, everything else is written
out. It serves models of the Llama and Qwen2 shape whose norms run in the model's own precision.
"""

import math

import torch


class Naive:
    def __init__(
        self,
        model,
        read="row",
        state_update="recursive",
        normalisation="rms",
        encode_evicted=True,
        whiten=False,
        centre=False,
        write_gate=False,
        state_per_head=False,
    ):
        self.weights = {
            name.removeprefix("base_model.model.").replace("base_layer.", "").replace(".default", ""): tensor
            for name, tensor in model.state_dict().items()
        }
        self.config = model.config
        self.read, self.state_update, self.normalisation = read, state_update, normalisation
        self.encode_evicted, self.whiten, self.centre, self.write_gate = encode_evicted, whiten, centre, write_gate
        self.state_per_head = state_per_head
        self.use_global_tokens = True

    def linear(self, name, x, state=None):
        """W x + b, and x A S B with s = 1 where this linear carries an adapter."""
        w = self.weights
        y = w[f"{name}.weight"] @ x
        if f"{name}.bias" in w:
            y = y + w[f"{name}.bias"]
        if state is not None and f"{name}.pte_down.weight" in w:
            down, up = w[f"{name}.pte_down.weight"], w[f"{name}.pte_up.weight"]
            middle = state if self.read == "column" else state.T
            y = y + up @ (middle @ (down @ x))
        if f"{name}.lora_A.weight" in w:
            y = y + w[f"{name}.lora_B.weight"] @ (w[f"{name}.lora_A.weight"] @ x)
        return y

    def rms_norm(self, name, x):
        return self.weights[f"{name}.weight"] * x / torch.sqrt((x * x).mean() + self.config.rms_norm_eps)

    def norm(self, state):
        """Norm of eq. 4, with the same small constant under the root as the package."""
        square = (state * state).mean() if self.normalisation == "rms" else (state * state).mean(1, keepdim=True)
        return state / torch.sqrt(square + 1e-6)

    def rotate(self, x, position):
        """Rotary: in every head, the pair (j, j + half) turns by position * theta ** (-j / half)."""
        size, half = self.config.head_dim, self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        out = x.clone()
        for head in range(0, x.shape[0], size):
            for j in range(half):
                # float32, as transformers computes its angles
                angle = torch.tensor(position, dtype=torch.float32) * (1.0 / theta ** torch.tensor(2 * j / size))
                cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
                a, b = x[head + j], x[head + j + half]
                out[head + j], out[head + j + half] = a * cos - b * sin, b * cos + a * sin
        return out

    def queries(self, layer):
        """W_Q^a q_g."""
        attention, w = f"model.layers.{layer}.self_attn", self.weights
        q_g = [self.linear(f"{attention}.q_proj", h) for h in w[f"{attention}.pte_encoder.global_tokens"]]
        return torch.stack(q_g) @ w[f"{attention}.pte_encoder.query_map.weight"].T

    def latents(self, layer, key, value, evicted=True):
        """W_K^a k and W_V^a v of one token, a pair for every state that there is."""
        enc, w = f"model.layers.{layer}.self_attn.pte_encoder", self.weights
        if self.centre and evicted:
            key, value = key - w[f"{enc}.key_centre"].flatten(), value - w[f"{enc}.value_centre"].flatten()
        if self.whiten:
            key = key @ torch.block_diag(*w[f"{enc}.key_whitener"])
            value = value @ torch.block_diag(*w[f"{enc}.value_whitener"])
        factor = 1.0
        if self.write_gate and evicted:
            gate, total = f"{enc}.write_gate", w[f"{enc}.write_gate.offset"]
            for part, x in (("key", key), ("value", value)):
                total = total + w[f"{gate}.{part}_weight"] @ x / torch.sqrt((x * x).mean() + 1e-6)
            factor = 2 / (1 + torch.exp(-total))
        key_map, value_map = w[f"{enc}.key_map.weight"], w[f"{enc}.value_map.weight"]
        if not self.state_per_head:
            return [(key_map @ key, value_map @ (factor * value))]
        size = self.config.head_dim
        parts = [slice(start, start + size) for start in range(0, len(key), size)]
        return [(key_map[:, part] @ key[part], value_map[:, part] @ (factor * value)[part]) for part in parts]

    def by_head(self, layer, matrices):
        """Q times a matrix: with a state per head, the first head's times the first of the global tokens' queries."""
        return torch.cat([q @ m for q, m in zip(self.queries(layer).chunk(len(matrices)), matrices, strict=True)])

    def products(self, latents):
        """The sum of k v^T over tokens, a matrix per head."""
        return [sum(torch.outer(*pair) for pair in head) for head in zip(*latents, strict=True)]

    def first_accumulator(self, layer):
        tokens = self.weights.get(f"model.layers.{layer}.self_attn.pte_encoder.global_tokens")
        if tokens is None:
            return None
        attention = f"model.layers.{layer}.self_attn"
        k_g = torch.stack([self.linear(f"{attention}.k_proj", h) for h in tokens])
        v_g = torch.stack([self.linear(f"{attention}.v_proj", h) for h in tokens])
        latents = [self.latents(layer, k, v, evicted=False) for k, v in zip(k_g, v_g, strict=True)]
        state = self.norm(self.by_head(layer, self.products(latents)))
        return state if self.use_global_tokens else torch.zeros_like(state)

    def evict(self, layer, count):
        """The oldest `count` thoughts of a layer leave; what they say goes into its memory."""
        thoughts = self.thoughts[layer]
        gone, self.thoughts[layer] = thoughts[:count], thoughts[count:]
        if self.accumulator[layer] is not None and self.encode_evicted:
            self.remember(layer, [self.latents(layer, *entry) for entry in gone])

    def remember(self, layer, latents):
        """One eviction: S' = (W_Q^a q_g) (W_K^a K)^T (W_V^a V), or the delta rule token by token."""
        rule = f"model.layers.{layer}.self_attn.pte_encoder.rule"
        total = self.accumulator[layer]
        if self.state_update == "delta":
            rate = self.weights[f"{rule}.rate"].sigmoid()
            memory = self.memory[layer] or [torch.zeros_like(torch.outer(*pair)) for pair in latents[0]]
            for token in latents:
                for head, (key, value) in enumerate(token):
                    key = key / torch.sqrt((key * key).sum() + 1e-6 * len(key))
                    memory[head] = memory[head] + rate * torch.outer(key, value - memory[head].T @ key)
            self.memory[layer] = memory
            return
        if self.state_update == "gated_sum":
            total = self.weights[f"{rule}.gate"].sigmoid().unsqueeze(1) * total
        total = total + self.by_head(layer, self.products(latents))
        self.accumulator[layer] = self.norm(total) if self.state_update == "recursive" else total

    def state(self, layer):
        """S of now."""
        state = self.accumulator[layer]
        if state is None or self.state_update == "recursive":
            return state
        if self.state_update == "delta" and self.memory[layer] is not None:
            state = state + self.by_head(layer, self.memory[layer])
        return self.norm(state)

    def attend(self, layer, x, position, state, is_prompt):
        name, config = f"model.layers.{layer}.self_attn", self.config
        size = config.head_dim
        query = self.rotate(self.linear(f"{name}.q_proj", x, state=state), position)
        key = self.rotate(self.linear(f"{name}.k_proj", x, state=state), position)
        value = self.linear(f"{name}.v_proj", x, state=state)
        (self.prompts if is_prompt else self.thoughts)[layer].append((key, value))
        seen = self.prompts[layer] + self.thoughts[layer]
        heads = []
        for head in range(config.num_attention_heads):
            shared = head // (config.num_attention_heads // config.num_key_value_heads)
            part = slice(shared * size, (shared + 1) * size)
            q = query[head * size : (head + 1) * size]
            scores = torch.stack([q @ k[part] / math.sqrt(size) for k, _ in seen])
            heads.append(scores.softmax(0) @ torch.stack([v[part] for _, v in seen]))
        return self.linear(f"{name}.o_proj", torch.cat(heads), state=state)

    def feed(self, token, position, is_prompt):
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_hidden_layers):
            name, state = f"model.layers.{layer}", self.state(layer)
            x = x + self.attend(layer, self.rms_norm(f"{name}.input_layernorm", x), position, state, is_prompt)
            inner = self.rms_norm(f"{name}.post_attention_layernorm", x)
            gate = torch.nn.functional.silu(self.linear(f"{name}.mlp.gate_proj", inner, state=state))
            up = self.linear(f"{name}.mlp.up_proj", inner, state=state)
            x = x + self.linear(f"{name}.mlp.down_proj", gate * up, state=state)
        return self.linear("lm_head", self.rms_norm("model.norm", x))

    @torch.no_grad()
    def logps(self, prompt, completion, window, ratio, temperature):
        """(completion, vocab) log-probs; `prompt` and `completion` are lists of token ids."""
        layers = range(self.config.num_hidden_layers)
        self.prompts, self.thoughts = [[] for _ in layers], [[] for _ in layers]
        self.accumulator = [self.first_accumulator(layer) for layer in layers]
        self.memory = [None for _ in layers]  # M of the delta rule, zero until something is written
        for position, token in enumerate(prompt):
            logits = self.feed(token, position, is_prompt=True)
        out = [logits]
        for i, token in enumerate(completion[:-1]):
            if len(self.thoughts[0]) == window:
                for layer in layers:
                    self.evict(layer, math.ceil(ratio * window))
            out.append(self.feed(token, len(prompt) + i, is_prompt=False))
        return (torch.stack(out) / temperature).log_softmax(-1)
