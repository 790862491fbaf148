"""What recipes/evaluate.py refuses: settings, models and adapters, and folders that hold something else."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pte_trl.evaluation.benchmarks import load_benchmark
from pte_trl.evaluation.config import ModelSource
from pte_trl.evaluation.regrade import main as regrade_command
from pte_trl.evaluation.script import main
from pte_trl.runtime.ownership import own
from tests.evaluations import argv, content, untrained


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    main(argv(setting, out))
    return out


def spoilt(setting, folder, name: str, change) -> Path:
    """A copy of the model or the adapter with other weights."""
    copy = shutil.copytree(setting / name, folder / name)
    (file,) = copy.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return copy


def nan_in_last(tensors: dict) -> dict:
    tensors[max(tensors)].view(-1)[0] = float("nan")
    return tensors


def finished_files(folder) -> list:
    return [path.name for name in ("records.jsonl", "manifest.json") for path in folder.rglob(name)]


@pytest.mark.parametrize("options", [{}, {"budget": None}, {"temperature": 0}, {"eviction": "h2o"}])
def test_a_model_that_is_not_finite_is_not_recorded_as_wrong(setting, tmp_path, options):
    model = spoilt(setting, tmp_path, "model", nan_in_last)
    message = (
        r"error: .*sums.jsonl, rank 0: log-probs are not finite \(nan\) in 2 of 2 samples, first in problem .*prompt"
    )
    with pytest.raises(SystemExit, match=message):
        main(
            argv(setting, tmp_path / "out", model_name_or_path=model, limit=2, samples=1, max_new_tokens=4, **options)
        )
    assert finished_files(tmp_path) == []


ADAPTERS = {
    "hold NaN or infinity, first": nan_in_last,
    "lacks": lambda tensors: {name: tensors[name] for name in sorted(tensors)[::2]},
}


@pytest.mark.parametrize("message", ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused(setting, tmp_path, message):
    adapter = spoilt(setting, tmp_path, "adapter", ADAPTERS[message])
    with pytest.raises(SystemExit, match=message):
        main(argv(setting, tmp_path / "out", adapter=adapter))
    assert finished_files(tmp_path) == []


def test_a_base_model_whose_weights_changed_is_another_setting(setting, finished, tmp_path):
    """The first half of the records is there; the other must not be another model's."""
    model = spoilt(setting, tmp_path, "model", lambda tensors: {n: t + 1e-3 for n, t in tensors.items()})
    (tmp_path / "out/sums").mkdir(parents=True)
    lines = content(finished).replace(json.dumps(str(setting / "model")), json.dumps(str(model)))
    (tmp_path / "out/sums/part-0.jsonl").write_text("".join(lines.splitlines(keepends=True)[:9]))
    with pytest.raises(SystemExit, match=r"holds records with base_sha256='\w+', this evaluation has '\w+'"):
        main(argv(setting, tmp_path / "out", model_name_or_path=model))
    assert finished_files(tmp_path) == []


def test_a_budget_that_no_prompt_fits_is_refused(setting, tmp_path):
    message = r"budget=8: .*sums.jsonl has no prompt that leaves room in it, the shortest has \d+ tokens; allowed are"
    with pytest.raises(SystemExit, match=message):
        main(argv(setting, tmp_path, budget=8))
    assert finished_files(tmp_path) == []


def test_a_second_evaluation_in_the_same_place_is_refused(setting, tmp_path):
    own(tmp_path / "sums")
    with pytest.raises(SystemExit, match=r"sums: this process is writing there; wait for it or end it"):
        main(argv(setting, tmp_path))


def test_a_damaged_line_ends_an_evaluation_with_its_file_and_number(setting, finished, tmp_path):
    shutil.copytree(finished / "sums", tmp_path / "sums")
    records = tmp_path / "sums/records.jsonl"
    records.write_text(records.read_text() + '{"a": 1}\n')
    with pytest.raises(SystemExit, match=r"error: .*records\.jsonl, line 22: a record without a proper problem_id"):
        main(argv(setting, tmp_path))


BAD = [
    ({"eviction": "h2o", "budget": None}, "eviction='h2o': nothing is evicted from a full cache"),
    ({"budget": 1}, "budget=1"),
    ({"window": 8}, "window=8, budget=48"),
    ({"temperature": -1}, "temperature=-1"),
    ({"top_p": 0}, "top_p=0"),
    ({"samples": 0}, "samples=0"),
    ({"evict_ratio": 2}, "evict_ratio=2"),
    ({"dtype": "int8"}, "dtype='int8'"),
    ({"eviction": "youngest"}, "eviction='youngest'"),
    ({"adapter": "/nowhere"}, "/nowhere"),
    ({"benchmarks": "math5000"}, "math5000"),
    ({"chat_template_kwargs": "{"}, "chat_template_kwargs='{'"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2': allowed are"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_stops_before_the_weights_load(setting, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("pte_trl.evaluation.script.load_for_evaluation", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises((SystemExit, ValueError), match=message):
        main(argv(setting, tmp_path, **changes))


# ---- what is there already ----------------------------------------------------------------------------------------


def test_other_problems_under_the_same_name_are_refused(setting, finished, tmp_path):
    before = content(finished)
    other = tmp_path / "sums.jsonl"
    other.write_text((setting / "sums.jsonl").read_text().replace("Find", "Seek"))
    with pytest.raises(SystemExit, match="benchmark_sha256"):
        main(argv(setting, finished, benchmarks=other))
    assert content(finished) == before


def test_fewer_samples_than_are_there_already_are_refused(setting, finished, tmp_path):
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "part-0.jsonl").write_text("".join(content(finished).splitlines(keepends=True)[:9]))
    with pytest.raises(SystemExit, match=r"9 samples of another selection.*samples=2"):
        main(argv(setting, tmp_path, samples=2))


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.5), ("budget", 56), ("samples", 2), ("seed", 1)])
def test_a_folder_of_other_settings_is_refused(setting, finished, key, value):
    before = content(finished)
    with pytest.raises(SystemExit, match=f"{key}={value}|{key}=48|{key}=1.0|{key}=0"):
        main(argv(setting, finished, **{key: value}))
    assert content(finished) == before


def test_what_is_there_is_looked_at_before_the_weights_load(setting, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pte_trl.evaluation.script.load_for_evaluation", lambda *_: pytest.fail("weights were loaded"))
    main(argv(setting, finished))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"temperature=1\.0, this evaluation has 0\.5"):
        main(argv(setting, finished, temperature=0.5))
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out/sums/records.jsonl").write_text("5\n")
    with pytest.raises(SystemExit, match=r"records\.jsonl, line 1: is 5 and no record"):
        main(argv(setting, tmp_path / "out"))


def test_an_adapter_trained_anew_is_another_setting(setting, finished, tmp_path):
    shutil.copytree(finished / "sums", tmp_path / "sums")
    other = shutil.copytree(setting / "adapter", tmp_path / "adapter") / "adapter_model.safetensors"
    weights = load_file(other)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, other)
    shutil.move(setting / "adapter", setting / "before")
    try:
        shutil.copytree(tmp_path / "adapter", setting / "adapter")
        with pytest.raises(SystemExit, match="adapter_sha256"):
            main(argv(setting, tmp_path))
    finally:
        shutil.rmtree(setting / "adapter")
        shutil.move(setting / "before", setting / "adapter")


def test_nothing_to_grade_again_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"no records\.jsonl below"):
        regrade_command([str(tmp_path)])


# ---- settings ----------------------------------------------------------------------------------------------------


def test_text_is_no_leave_to_run_code(tmp_path):
    (tmp_path / "r.yaml").write_text('model_name_or_path: m\ntrust_remote_code: "false"\n')
    with pytest.raises(ValueError, match="trust_remote_code='false': must be true or false"):
        ModelSource(recipe=str(tmp_path / "r.yaml"))


def test_a_known_benchmark_with_missing_rows_is_refused(tmp_path):
    (tmp_path / "aime24.jsonl").write_text(json.dumps({"id": "1", "problem": "p", "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match="aime24: has 1 problems, must have 30"):
        load_benchmark("aime24", tmp_path)
