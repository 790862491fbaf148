"""Which variables a recipe may set by `env`, which TrlParser puts into the environment of the training.

Others could load code (PYTHONPATH, LD_PRELOAD, NCCL_NET_PLUGIN, CC, PATH, ...), and no list of those is complete. So
names that are known to hold plain values are listed; whatever else is needed is set where the command is typed.
"""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")
CUDA = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG")
PYTORCH = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
)
NETWORK = (
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "GLOO_SOCKET_IFNAME",
    "PTE_MEET_LIMIT",
)
HUB = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
LOGGING = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "ACCELERATE_LOG_LEVEL")
TRACKERS = (
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_NAME",
    "WANDB_RUN_GROUP",
    "WANDB_TAGS",
    "WANDB_DISABLED",
    "TRACKIO_PROJECT",
    "TRACKIO_SPACE_ID",
)
ALLOWED = {*THREADS, *CUDA, *PYTORCH, *NETWORK, *HUB, *LOGGING, *TRACKERS}


def check_environment(env) -> None:
    """Refuses variables that could make a program run something else than it would.

    Args:
        env: the value of `env` in a recipe.

    Raises:
        ValueError: naming the variable and what is allowed.
    """
    if env is None:
        return
    if not isinstance(env, dict):
        raise ValueError(f"env={env!r}: must hold `NAME: value` lines")
    for name, value in env.items():
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"env: {name}={value!r}: must be text or a number")
        if name not in ALLOWED:
            raise ValueError(
                f"env: {name}={value!r}: a recipe may not set it, since it could run code or change what is run; "
                f"set it where the command is typed; allowed are {', '.join(sorted(ALLOWED))}"
            )
