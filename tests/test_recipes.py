"""Recipes parse, say where their values come from, and bad ones are refused before any weights load."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from pte_trl.runtime.entry import REPORT
from pte_trl.settings.parsing import parse, read_recipe
from pte_trl.training.arguments import RecipeArguments, parse_recipe
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.distill import PteDistillConfig
from pte_trl.training.global_batch import accumulation_steps, set_accumulation
from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PAPER = [ROOT / f"recipes/{name}.yaml" for name in ("qwen3b", "qwen7b", "llama8b")]
CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_every_line_has_its_reason(path):
    classes = (RecipeArguments, PteDistillConfig if "distill" in path.stem else PteGRPOConfig)
    _, args = parse(classes, ["--config", str(path), *CPU])
    assert args.method == "pte"
    values = [line for line in path.read_text().splitlines() if re.match(r"\w+:", line)]
    unexplained = [
        line for line in values if " # " not in line and not line.startswith(("output_dir", "save_strategy"))
    ]
    assert not unexplained


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_the_values_the_paper_states(path):
    script, args = parse_recipe(["--config", str(path), *CPU])
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == args.global_batch == 512
    assert (args.learning_rate, args.max_grad_norm, args.max_completion_length) == (1e-5, 1.0, 3072)
    assert (script.rank, script.num_global_tokens, args.evict_ratio, args.window) == (32, 32, 0.25, "auto")
    assert script.dataset_name == "dapo_math_17k"
    assert args.replay == "segments"  # stated, so that a reproduction does not depend on the card


def test_the_command_line_beats_the_recipe():
    script, args = parse_recipe(["--config", str(ROOT / "recipes/tiny.yaml"), "--window", "24", "--rank", "8"])
    assert (args.window, script.rank) == (24, 8)
    script, args = parse_recipe([f"--config={ROOT / 'recipes/tiny.yaml'}"])
    assert args.window == 16


def recipe(tmp_path, **changes) -> list[str]:
    values = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text()) | {"output_dir": str(tmp_path)} | changes
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


GLOBAL = {"gradient_accumulation_steps": None}
BAD = [
    ({"window": 0}, "window=0"),
    ({"window": "wide"}, "window='wide'"),
    ({"window": None}, "exactly one"),
    ({"budget": 64}, "exactly one"),
    ({"window": None, "budget": 1}, "budget=1"),
    ({"rollout_batch_size": 0}, "rollout_batch_size=0"),
    ({"rollout_batch_size": "many"}, "rollout_batch_size='many'"),
    ({"replay": "two_pass"}, "replay='two_pass'"),
    ({"replay": "segments", "segment_length": 0}, "segment_length=0"),
    ({"replay": "segments", "method": "lora", "window": None}, "replay='segments'"),
    ({"offload_cache": True}, "offload_cache=True: only with replay=segments"),
    ({"evict_ratio": 1.5}, "evict_ratio=1.5"),
    *(
        ({"optim_args": wrong}, f"optim_args='{wrong}': must be NAME=VALUE pairs")
        for wrong in ("foo", "a=1,b", "a=1=2")
    ),
    ({"save_strategy": "best"}, "save_strategy='best' with metric_for_best_model=None: needs metric_for_best_model"),
    (
        {"save_strategy": "best", "metric_for_best_model": "eval_reward"},
        "save_strategy='best' with eval_strategy='no'",
    ),
    ({"method": "lorac"}, "method='lorac'.*lora_c"),
    ({"method": "lora"}, "window=16.*full cache"),
    ({"top_p": 0.9}, "top_p=0.9"),
    ({"top_k": 50}, "top_k=50"),
    ({"min_p": 0.1}, "min_p=0.1"),
    ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"use_vllm": True}, "use_vllm"),
    ({"loss_type": "bogus"}, "loss_type='bogus'"),
    ({"max_steps": 2.5}, "max_steps=2.5.*integer"),
    ({"beta": True}, "beta=True.*number"),
    ({"rank": "many"}, "rank='many'"),
    ({"save_strategy": False}, "save_strategy=False.* not in quotes"),
    ({"windw": 16}, "windw=16: no such key"),
    ({"per_device_train_batch_size": 3}, "divisible"),
    (GLOBAL | {"global_batch": 192}, "global_batch=192: 1 processes .* take 128 .* allowed are multiples of 128"),
    (
        {"global_batch": 256},
        "global_batch=256, gradient_accumulation_steps=1: give one .* gradient_accumulation_steps=2",
    ),
    (GLOBAL | {"global_batch": 0}, "global_batch=0: must be an integer of at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_a_bad_recipe_names_key_value_and_what_is_allowed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe(tmp_path, **changes))


def batch_of(args) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


@pytest.mark.parametrize("processes", [1, 2, 8, 16])
def test_the_global_batch_is_kept_on_any_number_of_processes(monkeypatch, processes):
    """By the launcher's variable; test_startup.py has a real launch."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))

    def steps(micro: int, given: int | None = None, global_batch: int | None = 64) -> int:
        args = SimpleNamespace(
            global_batch=global_batch, per_device_train_batch_size=micro, gradient_accumulation_steps=given
        )
        set_accumulation(args)
        return args.gradient_accumulation_steps

    for micro in (1, 2, 4):
        needed = steps(micro)
        assert needed * micro * processes == 64 and steps(micro, given=needed) == needed
        with pytest.raises(
            ValueError, match=f"^global_batch=64, gradient_accumulation_steps=3: give one .*={needed}, "
        ):
            steps(micro, given=3)
    with pytest.raises(
        ValueError, match=f"^global_batch=64: {processes} processes with .*=3 take {3 * processes} comp"
    ):
        steps(3)
    assert (steps(3, global_batch=None), steps(3, given=5, global_batch=None)) == (1, 5)


@pytest.mark.parametrize("config", [PteGRPOConfig, PteDistillConfig])
def test_both_trainers_have_a_global_batch(tmp_path, config):
    settings = {"output_dir": str(tmp_path), "window": 8, "use_cpu": True, "bf16": False, "report_to": "none"}
    args = config(**settings, global_batch=64)
    assert batch_of(args) == 64
    assert config(**settings).gradient_accumulation_steps == 1


LAUNCHES = re.compile(r"(.*)(?:grpo_pte\.py --config|slurm\.sh) (recipes/(?:qwen3b|qwen7b|llama8b)\.yaml)([^\n`]*)")


def launches() -> list[tuple[str, str, str, Path]]:
    """What stands before a recipe of the paper, the recipe, flags, and the file, of every line that launches one."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "recipes/slurm.sh"]
    files += [*PAPER, *(ROOT / "accelerate_configs").glob("*.yaml")]
    texts = {path: re.sub(r"\\\n#? *", "", path.read_text()) for path in files}
    return [(*found, path) for path, text in texts.items() for found in LAUNCHES.findall(text)]


def gpus_of(before: str, path: Path) -> int:
    """As many as a launch line names, by itself or by its config; 8 where it names none."""
    nodes, gpus = (re.search(rf"--(?:{name})[= ](\d+)", before) for name in ("nodes", "gpus-per-node|num_processes"))
    config = ROOT / "accelerate_configs/ddp.yaml" if path.parent.name != "accelerate_configs" else path
    counted = yaml.safe_load(config.read_text())["num_processes"]
    return (int(nodes[1]) if nodes else 1) * int(gpus[1]) if gpus else counted


def test_every_launch_of_a_paper_recipe_has_its_global_batch():
    found = launches()
    assert {16, 8} <= {gpus_of(before, path) for before, _, _, path in found} and len(found) > 8
    for before, path, flags, file in found:
        _, args = parse_recipe(["--config", str(ROOT / path), *flags.split("#")[0].split(), *CPU])
        assert args.global_batch == 512, (file, flags)
        accumulation_steps(512, args.per_device_train_batch_size, gpus_of(before, file))


def test_a_flag_for_the_accumulation_takes_the_place_of_the_recipes_global_batch():
    command = ["--config", str(PAPER[0]), *CPU]
    _, args = parse_recipe([*command, "--gradient_accumulation_steps", "4"])
    assert (args.global_batch, batch_of(args)) == (None, 32)
    _, args = parse_recipe([*command, "--per_device_train_batch_size", "2", "--global_batch", "64"])
    assert (args.gradient_accumulation_steps, batch_of(args)) == (32, 64)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text((ROOT / "recipes/tiny.yaml").read_text() + "\nwindow: 99\n")
    with pytest.raises(ValueError, match="window: occurs twice"):
        parse_recipe(["--config", str(path)])


@pytest.mark.parametrize("flag", ["--budg", "--budg=20", "--windw"])
def test_a_flag_is_written_out_and_known(tmp_path, flag):
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]}: no such flag"):
        parse_recipe([*recipe(tmp_path, window=None, budget=40), flag, *([] if "=" in flag else ["20"])])


def test_a_missing_recipe_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        parse_recipe(["--config", "nowhere.yaml"])


def run(tmp_path, *flags):
    command = [python(), str(ROOT / "recipes/grpo_pte.py"), *recipe(tmp_path), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)


def test_the_script_stops_in_one_line_before_weights_load(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
    model.save_pretrained(tmp_path / "model")
    data = tmp_path / "problems.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    done = run(tmp_path, "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: model_type='gpt2': GPT2LMHeadModel: PTE finds no attention"), last


def test_what_nobody_has_foreseen_says_where_to_report_it(tmp_path):
    code = "from pte_trl.runtime.entry import run; run(lambda: {}['nothing'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "KeyError: 'nothing'" in lines[-2] and lines[-1] == REPORT


MERGED = "defaults: &defaults\n  beta: 0.1\n"


def test_a_merge_key_is_yaml(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {beta: 0.1, seed: 3}\nb:\n  <<: *a\n  seed: 4\n")
    assert read_recipe("config", str(path))["b"] == {"beta": 0.1, "seed": 4}


ODD_FILES = {
    "": "must hold `key: value` lines, found NoneType",
    "5": "must hold `key: value` lines, found int",
    "? [a, b]\n: 1\n": r"\['a', 'b'\]: must be text to be a key",
    "1: 2\n": "1: must be text to be a key",
    "a: [": "not plain YAML",
    "env: {PYTHONPATH: /x}": "a recipe may not set it",
}


@pytest.mark.parametrize("text", ODD_FILES)
def test_an_odd_recipe_file_is_named(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=ODD_FILES[text]):
        parse_recipe(["--config", str(path)])


@pytest.mark.parametrize(("flag", "kept"), [("window", "budget"), ("budget", "window")])
def test_a_flag_takes_the_place_of_the_recipes_other_cache_key(tmp_path, flag, kept):
    script, args = parse_recipe([*recipe(tmp_path, **{"window": None, "budget": None, kept: 40}), f"--{flag}", "24"])
    assert (getattr(args, flag), getattr(args, kept)) == (24, None)
    assert flag in script.given and kept not in script.given
