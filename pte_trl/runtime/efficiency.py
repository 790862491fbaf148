"""The efficiency columns of Tables 1 and 3: TFLOPs of attention, and memory while training.

The paper gives no formula for its TFLOPs. Ours counts what a sample's forward must compute: every pair of a query
and a key that it may see costs 2 d FLOPs for the score and 2 d for the value, d being all query heads together, in
every layer with attention. A sliding layer sees its own window, whatever the cache policy is. (The paper's full-cache
figures, 4.2, 5.7 and 7.4 for its three models, fit 4 L d T^2 with T = 3,770 for all three: the whole square, twice the
causal half that we count.)
"""

import statistics
import threading
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from pte_trl.cache.schedule import Schedule
from pte_trl.estimate.shape import shape_of
from pte_trl.runtime.manifest import hardware, write_json

TFLOPS_METRIC = "attention/tflops_max"


def visible_pairs(prompt: int, completion: int, schedule: Schedule | None) -> int:
    """Query-key pairs of one sample, each query with itself; `schedule` is None for the full cache."""
    thought = torch.arange(completion)
    first = schedule.first_visible(thought) if schedule else torch.zeros_like(thought)
    return prompt * (prompt + 1) // 2 + int((prompt + thought + 1 - first).sum())


def sliding_pairs(length: int, window: int) -> int:
    """The same of a sample in a layer that sees `window` tokens, the query itself among them."""
    seen = min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * window


def attention_tflops(config, pairs: int, length: int) -> float:
    """10^12 FLOPs of one forward through the attention of a model with this configuration.

    Args:
        pairs: of `visible_pairs`, for the layers that the cache policy applies to.
        length: of the sample, prompt and completion, for sliding layers.

    Raises:
        NotEstimated: a model whose layers are not known.
    """
    found = 0
    for layer in shape_of(config).layers:
        seen = pairs if layer.window is None else sliding_pairs(length, layer.window)
        found += 2 * (layer.query + layer.output) * seen
    return found / 1e12


def memory_share(device: torch.device) -> float:
    """Percent of the card in use, by all programs; of the machine's memory, by this process, on a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return 100 * (total - free) / total
    return 100 * psutil.Process().memory_info().rss / psutil.virtual_memory().total


class EfficiencyCallback(TrainerCallback):
    """Samples the memory while training and writes efficiency.json into the output folder at the end.

    Args:
        interval: seconds between two samples.
    """

    def __init__(self, interval: float = 0.5):
        self.interval, self.samples, self._stop = interval, [], threading.Event()

    def _watch(self, device: torch.device) -> None:
        while not self._stop.wait(self.interval):
            self.samples.append(memory_share(device))

    def on_train_begin(self, args, state, control, **kwargs):
        self.samples = [memory_share(args.device)]
        self._stop.clear()
        threading.Thread(target=self._watch, args=(args.device,), daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop.set()
        ranks = gather_object([(max(self.samples), statistics.fmean(self.samples))])
        tflops = [float(entry[TFLOPS_METRIC]) for entry in state.log_history if TFLOPS_METRIC in entry]
        if not state.is_world_process_zero:
            return
        cuda = args.device.type == "cuda"
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(
            Path(args.output_dir) / "efficiency.json",
            {
                "attention_tflops_max": max(tflops, default=None),
                "gpu_mem_peak_pct": max(peak for peak, _ in ranks),
                "gpu_mem_mean_pct": statistics.fmean(mean for _, mean in ranks),
                "memory_of": hardware(args.device) if cuda else "the process, on a machine without a GPU",
            },
        )
