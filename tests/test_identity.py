"""What decides a result is in its settings by content, and a run that resumes with other content is refused."""

import json
import os
import time
from dataclasses import fields
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from datasets import Dataset

from pte_trl.runtime import identity
from pte_trl.runtime.identity import (
    adapter_identity,
    base_identity,
    kept_sha256,
    rows_identity,
    template_identity,
    training_identity,
    verdict_versions,
)
from pte_trl.runtime.resume import FREE, as_read, differences, starting_point
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.described import recipe_settings
from pte_trl.training.distill import PteDistillConfig
from tests.test_resume import args_of, checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model_folder(folder):
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text(name)
    return folder


# File -> the key of the settings that must change with it, None for those that decide nothing.
DECIDE = {
    "model.safetensors": "base_sha256",
    "model-00001-of-00002.safetensors": "base_sha256",
    "model.safetensors.index.json": "base_sha256",
    "pytorch_model.bin": "base_sha256",
    "weights-q4.gguf": "base_sha256",
    "config.json": "base_sha256",
    "generation_config.json": "base_sha256",
    "tokenizer.json": "tokenizer_sha256",
    "tokenizer_config.json": "tokenizer_sha256",
    "tokenizer.model": "tokenizer_sha256",
    "special_tokens_map.json": "tokenizer_sha256",
    "vocab.json": "tokenizer_sha256",
    "merges.txt": "tokenizer_sha256",
    "README.md": None,
    "training_args.bin": None,
}


@pytest.mark.parametrize("name", DECIDE)
def test_each_file_of_a_model_changes_its_own_key(tmp_path, name):
    folder = model_folder(tmp_path / "model")
    before = base_identity(str(folder))
    assert before == base_identity(str(folder)) and all(before.values())
    (folder / name).write_text("changed")
    after = base_identity(str(folder))
    assert [key for key in before if before[key] != after[key]] == [DECIDE[name]] * (DECIDE[name] is not None)


KEYS = ("base_sha256", "tokenizer_sha256")


def test_a_model_of_the_hub_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--name"
    (repo / "snapshots/abc123").mkdir(parents=True)
    (repo / "snapshots/abc123/config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc123")
    monkeypatch.setattr(identity, "try_to_load_from_cache", _from(tmp_path))
    assert base_identity("org/name")["base_sha256"] == "commit abc123"
    assert base_identity("org/other")["base_sha256"] is None
    assert base_identity("org/name", commit="b" * 40) == dict.fromkeys(KEYS, "commit " + "b" * 40)


def _from(cache):
    from huggingface_hub import try_to_load_from_cache

    return lambda name, file: try_to_load_from_cache(name, file, cache_dir=cache)


def test_weights_are_read_once_and_again_when_they_are_changed(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 100)
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    first, read = kept_sha256(path), []
    original = identity.sha256_of
    monkeypatch.setattr(identity, "sha256_of", lambda path: read.append(path) or original(path))
    assert kept_sha256(path) == first and not read
    stat = path.stat()
    path.write_bytes(b"b" * 100)  # as large, and made to look as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert kept_sha256(path) != first and len(read) == 1
    identity.cache_file().write_text("not JSON")
    assert kept_sha256(path) == original(path)


def test_what_was_written_a_moment_ago_is_not_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a")
    kept_sha256(path)
    assert time.time() - path.stat().st_ctime < identity.SETTLED and not identity.cache_file().exists()


def test_a_home_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    assert kept_sha256(tmp_path / "file") == kept_sha256(tmp_path / "file")


def test_rows_are_what_is_in_them_and_their_order(tmp_path):
    rows = [{"id": "a/0", "prompt": "1+1", "answer": "2"}, {"id": "a/1", "prompt": "1+2", "answer": "3"}]
    whole = rows_identity(Dataset.from_list(rows))
    assert whole == rows_identity(Dataset.from_list([row | {"id": f"b/{n}"} for n, row in enumerate(rows)]))
    others = [rows[::-1], rows[:1], [rows[0], rows[1] | {"answer": "4"}], [rows[0], rows[1] | {"prompt": "1+3"}]]
    assert len({whole, *(rows_identity(Dataset.from_list(other)) for other in others)}) == 5


def test_an_adapter_is_its_weights_and_its_settings(tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (tmp_path / name).write_text(name)
    found = [adapter_identity(tmp_path)]
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("changed")
        found.append(adapter_identity(tmp_path))
    assert found[0] == found[1] and len(set(found)) == 3
    assert adapter_identity(None) is None


def test_the_versions_that_decide_a_verdict():
    found = verdict_versions()
    assert found["math_verify"] == version("math-verify") and found["sympy"] == version("sympy")
    assert set(found) == {"math_verify", "latex2sympy2_extended", "sympy", "antlr4_python3_runtime"}
    assert all(found.values())


CHANGES = {
    "base_sha256": lambda setting: (setting.model / "model.safetensors").write_text("other weights"),
    "tokenizer_sha256": lambda setting: (setting.model / "tokenizer.json").write_text("other tokens"),
    "adapter_sha256": lambda setting: (setting.adapter / "adapter_config.json").write_text("other alpha"),
    "template_sha256": lambda setting: setattr(setting.tokenizer, "chat_template", "another"),
    "data_sha256": lambda setting: setattr(setting, "rows", Dataset.from_list([{"prompt": "p", "answer": "4"}])),
}


@pytest.mark.parametrize("key", [*CHANGES, "versions"])
def test_a_training_that_goes_on_under_another_content_is_refused(tmp_path, key):
    """Every key of `training_identity`, so that a new one must be given a change here; versions are printed."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    setting = SimpleNamespace(
        model=model_folder(tmp_path / "model"),
        adapter=tmp_path / "adapter",
        tokenizer=SimpleNamespace(chat_template="one"),
        rows=Dataset.from_list([{"prompt": "p", "answer": "3"}]),
    )

    def settings() -> dict:
        script = SimpleNamespace(model_name_or_path=str(setting.model), adapter=str(setting.adapter))
        return training_identity(script, setting.tokenizer, setting.rows)

    before = settings()
    assert set(before) == {*CHANGES, "versions"}
    start = checkpoint(tmp_path / "run", 2, before)
    said = []
    if key == "versions":
        after = settings() | {"versions": before["versions"] | {"torch": "1.0"}}
        assert starting_point(args_of(tmp_path / "run"), after, said.append) == start
        assert said[0] == f"resumes under other versions: torch: {version('torch')!r} -> '1.0'"
        return
    assert starting_point(args_of(tmp_path / "run"), settings()) == start
    CHANGES[key](setting)
    assert [each.split(":")[0] for each in differences(before, settings())] == [key]
    with pytest.raises(ValueError, match=rf"checkpoint-2 is of a run with other settings \({key}: '\w+' -> '\w+'\)"):
        starting_point(args_of(tmp_path / "run"), settings())


def test_no_template_is_none(tmp_path):
    assert template_identity(SimpleNamespace(chat_template=None)) is None
    assert json.dumps(template_identity(SimpleNamespace(chat_template={"default": "x"})))


def test_a_distillation_is_not_the_finished_run_of_a_grpo(tmp_path):
    common = {"window": 8, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    script = RecipeArguments(model_name_or_path="m")
    settings = [recipe_settings(script, cls(**common)) for cls in (PteGRPOConfig, PteDistillConfig)]
    assert "config_class: 'PteGRPOConfig' -> 'PteDistillConfig'" in differences(*settings)


def test_what_is_written_into_a_config_later_changes_no_setting(tmp_path):
    """TRL does so under ZeRO-3."""
    common = {"window": 8, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    args = PteGRPOConfig(**common, gradient_checkpointing_kwargs={"use_reentrant": False})
    before = recipe_settings(RecipeArguments(model_name_or_path="m"), args)
    args.gradient_checkpointing_kwargs["use_reentrant"] = True
    assert before["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


@pytest.mark.parametrize("config", [PteGRPOConfig, PteDistillConfig])
def test_a_key_that_was_not_set_and_now_is_makes_another_run(config, tmp_path):
    """Whatever is None by default, `budget` for one, which takes the place of `window`."""
    args = config(window=8, output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    before = as_read(recipe_settings(RecipeArguments(model_name_or_path="m"), args))
    unset = [f.name for f in fields(args) if getattr(args, f.name) is None and not FREE.fullmatch(f.name)]
    assert "budget" in unset and len(unset) > 20
    for key in unset:
        assert differences(before, before | {key: 64}) == [f"{key}: None -> 64"]
        assert differences(before | {key: 64}, before) == [f"{key}: 64 -> None"]


def test_what_follows_from_the_global_batch_is_no_other_setting():
    """A finished run of eight processes is the same run for four."""
    eight = {"global_batch": 512, "gradient_accumulation_steps": 8, "steps_per_generation": 8, "seed": 1}
    four = eight | {"gradient_accumulation_steps": 16, "steps_per_generation": 16}
    assert differences(eight, four) == []
    assert differences(eight, four | {"global_batch": 256, "seed": 2}) == ["global_batch: 512 -> 256", "seed: 1 -> 2"]
    before = {key: value for key, value in eight.items() if key != "global_batch"}
    assert len(differences(before, four)) == 2
