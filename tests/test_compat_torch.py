"""What the private names of PyTorch, the engines, the hub and the grader must do (`pte_trl/compat`)."""

import dataclasses
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
import sympy
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.fsdp import fully_shard

from pte_trl.compat import engines, grading, hub
from pte_trl.compat import torch as compat_torch
from tests.compat_names import about


@pytest.fixture
def process_group(tmp_path):
    """A world of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- PyTorch -----------------------------------------------------------------------------------------------------


@about("torch.any_size")
def test_what_is_compiled_serves_any_size_of_a_marked_dimension():
    def doubled(x):
        return 2 * x

    made = []
    compiled = torch.compile(doubled, fullgraph=True, backend=lambda graph, inputs: made.append(graph) or graph)
    for rows, places in ((3, 8), (5, 8), (4, 16)):
        x = torch.ones(rows, 2, places)
        compat_torch.any_size(x, 0, 2)
        assert torch.equal(compiled(x), 2 * x)
    assert len(made) == 1
    compiled(torch.ones(3, 4, 8))
    assert len(made) == 2


@about("torch.nodes_after_fusion")
def test_kernels_are_counted_after_fusion_and_none_is_built():
    def product_and_more(x, weight):
        return ((x @ weight).exp() + 1).square()

    assert len(compat_torch.nodes_after_fusion(product_and_more, (torch.ones(4, 4), torch.ones(4, 4)))) == 2
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        compat_torch.nodes_after_fusion(lambda x: print(x.sum().item()), (torch.ones(2),))


@about("torch.gpu_kernels")
def test_what_runs_on_the_cpu_launches_no_kernel_of_a_gpu():
    assert compat_torch.gpu_kernels(lambda: torch.ones(2) + 1) == 0


@about("torch.forward_hooks")
def test_hooks_are_listed():
    module, hooks = nn.Linear(2, 2), [lambda *call: None, lambda *call: None]
    assert compat_torch.forward_hooks(module) == []
    module.register_forward_pre_hook(hooks[0])
    handle = module.register_forward_hook(hooks[1])
    assert compat_torch.forward_hooks(module) == hooks
    handle.remove()
    assert compat_torch.forward_hooks(module) == hooks[:1]


@about("torch.cpu_with_index")
def test_a_cpu_with_a_number_is_a_place_while_a_checkpoint_is_read(tmp_path):
    torch.save({"x": torch.arange(3)}, tmp_path / "x.pt")
    before = list(torch.serialization._package_registry)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="data location"):
            torch.load(tmp_path / "x.pt", map_location="cpu:0")
        with compat_torch.cpu_with_index(), compat_torch.cpu_with_index():
            found = torch.load(tmp_path / "x.pt", map_location=torch.device("cpu:0"))["x"]
        assert found.tolist() == [0, 1, 2] and found.device.type == "cpu"
    assert torch.serialization._package_registry == before


@about("torch.default_store")
def test_the_store_of_the_ranks(process_group):
    store = dist.PrefixStore("here", compat_torch.default_store().clone())
    store.set("a", "1")
    assert store.add("count", 2) == 2 and store.get("a") == b"1"


@about("torch.ended_by_sigterm")
def test_a_launcher_that_was_stopped_is_no_failure():
    def of_ranks(*codes: int) -> ChildFailedError:
        return ChildFailedError("x", {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes)})

    stopped = (SignalException("", signal.SIGTERM), of_ranks(143), of_ranks(-15, 143))
    failed = (SignalException("", signal.SIGINT), of_ranks(1), of_ranks(143, 1), of_ranks(-9), ValueError())
    assert all(map(compat_torch.ended_by_sigterm, stopped)) and not any(map(compat_torch.ended_by_sigterm, failed))


@about("torch.reshards_after_forward")
def test_what_fsdp2_lets_go_of(process_group):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for wanted in (True, False):
        unit = fully_shard(nn.Linear(2, 2), mesh=mesh, reshard_after_forward=wanted)
        assert compat_torch.reshards_after_forward(unit) == wanted
        unit.set_reshard_after_forward(not wanted, recurse=False)
        assert compat_torch.reshards_after_forward(unit) != wanted


@about("torch.FUSED_ATTENTION", "torch.fused_attention", "torch.fused_attention_backward")
@pytest.mark.parametrize("device", sorted(compat_torch.FUSED_ATTENTION))
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_kernels_of_attention_by_themselves(device, scale):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    inputs = [torch.randn(2, n, 3, 16, device=device).transpose(1, 2).requires_grad_() for n in (5, 7, 7)]
    bias = torch.zeros(2, 1, 5, 16, device=device)[..., :7]
    bias[:, :, :3, 4:] = float("-inf")
    expected = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=bias, scale=scale)
    grad = torch.randn_like(expected)
    with torch.no_grad():
        out, *rest = compat_torch.fused_attention(*inputs, bias, scale)
        found = compat_torch.fused_attention_backward(grad, *inputs, bias, scale, out, *rest)
    torch.testing.assert_close(out, expected)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@about("torch.TorchDispatchMode", "torch.schema_of", "torch.flop_formula")
def test_every_operation_is_seen():
    class Watch(compat_torch.TorchDispatchMode):
        seen, flops = [], 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out, schema = operation(*args, **(kwargs or {})), compat_torch.schema_of(operation)
            shares = any(x.alias_info is not None for x in schema.returns)
            self.seen.append((schema.name, schema.is_mutable, shares))
            formula = compat_torch.flop_formula(operation)
            self.flops += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            return out

    with Watch() as watch:
        (torch.ones(2, 3) @ torch.ones(3, 4)).add_(1).t()
    assert watch.flops == 2 * 2 * 3 * 4
    assert [row for row in watch.seen if row[0] != "aten::ones"] == [
        ("aten::mm", False, False),
        ("aten::add_", True, True),
        ("aten::t", False, True),
    ]


@about("torch.storage_id")
def test_tensors_that_share_memory_have_one_number():
    x, meta = torch.ones(4), torch.ones(4, device="meta")
    assert compat_torch.storage_id(x) == compat_torch.storage_id(x[1:]) != compat_torch.storage_id(x.clone())
    assert compat_torch.storage_id(meta) == compat_torch.storage_id(meta.view(2, 2)) != compat_torch.storage_id(x)


@about("torch.tree_leaves", "torch.tree_map_only")
def test_tensors_among_arguments():
    tree = ((torch.ones(1), [2]), {"a": torch.zeros(1)})
    assert [type(leaf) for leaf in compat_torch.tree_leaves(tree)] == [torch.Tensor, int, torch.Tensor]
    found = compat_torch.tree_map_only(torch.Tensor, lambda x: x.item(), tree)
    assert found == ((1.0, [2]), {"a": 0.0})


# ---- accelerate and DeepSpeed ------------------------------------------------------------------------------------


@about("engines.launch_parser")
def test_the_command_line_of_accelerate_launch():
    line = ["--use_deepspeed", "--zero_stage", "3", "--num_processes", "4", "train.py", "--num_processes", "9"]
    asked = engines.launch_parser().parse_args(line)
    assert (asked.use_deepspeed, asked.zero_stage, asked.num_processes) == (True, 3, 4)
    assert asked.training_script_args == ["--num_processes", "9"]
    rest = ("config_file", "deepspeed_config_file", "num_machines", "mixed_precision")
    assert all(getattr(asked, name) is None for name in rest) and not (asked.cpu or asked.use_fsdp or asked.multi_gpu)
    assert "fsdp_version" in vars(asked)


@about("engines.default_launch_config")
def test_the_file_that_accelerate_reads_by_itself(tmp_path, monkeypatch):
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 7\n")
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    assert engines.default_launch_config() == file
    assert config_args.load_config_from_file(None).num_processes == 7


@about("engines.keep_output_dtype")
def test_fsdp_leaves_results_as_they_are():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    before = plugin.mixed_precision_policy
    assert before.output_dtype == torch.bfloat16
    engines.keep_output_dtype(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy == dataclasses.replace(before, output_dtype=None)
    engines.keep_output_dtype(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None)))


@about("engines.gather_as_one")
def test_a_layer_is_one_unit_of_zero3():
    from deepspeed.utils import z3_leaf_module

    layer = nn.Sequential(nn.Linear(2, 2))
    engines.gather_as_one(layer)
    assert z3_leaf_module(layer) and not z3_leaf_module(layer[0])


def test_a_parameter_without_zero3_is_whole():
    assert engines.zero3_part(nn.Parameter(torch.ones(2))) is None
    assert engines.zero3_numel(nn.Parameter(torch.ones(2))) is None
    assert engines.running_zero_stage(nn.Linear(2, 2)) is None


# ---- huggingface_hub and datasets, grading -----------------------------------------------------------------------


@about("hub.datasets_cache")
def test_where_datasets_keeps_what_it_made(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert hub.datasets_cache() == tmp_path / "cache" and any(hub.datasets_cache().glob("json*"))


@about("hub.hub_home")
def test_where_the_hub_keeps_its_cache(tmp_path, monkeypatch):
    ask = "from huggingface_hub import constants; print(constants.HF_HOME)"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    found = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "home")  # what the variable says
    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path))
    assert hub.hub_home() == tmp_path


@about("grading.Latex2Sympy", "grading.ConversionConfig")
def test_the_grammar_of_math_verify():
    config = grading.ConversionConfig(lowercase_symbols=False)
    parser = grading.Latex2Sympy(is_real=True, config=config)
    found = parser.parse("X + x + \\frac{1}{2}")
    assert {str(symbol) for symbol in found.free_symbols} == {"X", "x"} and found.subs({}) is not None
    math = parser.create_parser("x + 1").math()
    rules = (math.set_relation(), math.set_elements(), math.set_elements_relation())
    assert sum(rule is not None for rule in rules) == 1


@about("grading.FiniteSet", "grading.members_in_order")
def test_a_set_keeps_the_order_it_was_written_in():
    found = grading.FiniteSet(3, 1, 2)
    assert grading.members_in_order(found) == [3, 1, 2] and list(found.args) == [1, 2, 3]
    assert isinstance(found, sympy.FiniteSet)


@about("grading.to_mpmath")
def test_numbers_of_any_size_become_mpmaths():
    huge = sympy.Float("1.5e400")
    found = grading.to_mpmath(huge, sympy.Float(-2))
    assert found.real / 10 ** sympy.Integer(400) == pytest.approx(1.5) and found.imag == -2


@about("grading.get_extraction_regexes")
def test_where_math_verify_looks_for_an_answer():
    from math_verify import ExprExtractionConfig

    ((patterns, config),) = grading.get_extraction_regexes([ExprExtractionConfig()])
    assert isinstance(config, ExprExtractionConfig)
    found = {rank: match for pattern, rank in patterns for match in pattern.finditer("2 and 3: the answer is 4 + 1")}
    (expression,) = filter(None, found[min(found)].groupdict().values())  # the lower the rank, the surer the place
    assert expression.strip() == "4 + 1"
