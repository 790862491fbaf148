"""Records on disk and the metrics computed from them."""

import itertools
import json
import multiprocessing
import resource

import pytest

from pte_trl.evaluation.metrics import pass_at_k, standard_error, summarise, table
from pte_trl.evaluation.records import SCHEMA, Parts, Record, read_records, write_records
from pte_trl.runtime.faults import Fault


def row(problem: str, sample: int, correct: bool, **changes) -> Record:
    usual = {"completion": r"\boxed{1}", "finish_reason": "stop", "tokens": 10, "evictions": 2}
    usual |= {"contaminated": False, "gold": "1", "gold_note": None, "schema": SCHEMA}
    return {"problem_id": problem, "sample": sample, "correct": correct} | usual | changes


def test_pass_at_k_is_the_share_of_all_subsets():
    for samples in range(1, 7):
        for correct in range(samples + 1):
            verdicts = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                subsets = [any(chosen) for chosen in itertools.combinations(verdicts, k)]
                assert pass_at_k(samples, correct, k) == pytest.approx(sum(subsets) / len(subsets))
    with pytest.raises(ValueError, match=r"k=3.*number of samples, 2"):
        pass_at_k(2, 1, 3)


def test_metrics_of_records_worked_out_by_hand():
    records = [
        row("a", 0, True, tokens=4),
        row("a", 1, False, completion="no box", finish_reason="length", tokens=20, evictions=5),
        row("b", 0, True, contaminated=True),
        row("b", 1, True, contaminated=True),
        row("c", 0, False, gold_note="read wrongly"),
        row("c", 1, False, completion="", finish_reason="no_room", tokens=0, gold_note="read wrongly"),
    ]
    found = summarise(records)
    assert (found["problems"], found["samples"], found["contaminated"], found["doubtful_golds"]) == (3, 2, 1, 1)
    assert found["pass@1"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["pass@k"] == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert found["pass@1_se"] == pytest.approx((0.25 / 3) ** 0.5)  # values 0.5, 1, 0: variance 0.25
    assert found["pass@1_se_runs"] == pytest.approx(standard_error([2 / 3, 1 / 3]))
    assert found["pass@1_clean"] == pytest.approx(1 / 4)
    rates = [found[f"{name}_rate"] for name in ("format", "truncation", "no_room")]
    assert rates == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert found["mean_tokens"] == pytest.approx((4 + 20 + 10 + 10 + 10 + 0) / 6)
    assert summarise(records[::-1])["pass@1"] == found["pass@1"]
    assert "| mine | 3 x 2 | 50.0 | 28.9 | 16.7 | 66.7 (k=2) |" in table({"mine": found})


def test_unequal_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"different numbers of samples: \[1, 2\]"):
        summarise([row("a", 0, True), row("a", 1, True), row("b", 0, True)])
    with pytest.raises(ValueError, match="no records"):
        summarise([])


def test_a_line_cut_by_a_kill_is_dropped_and_the_rest_kept(tmp_path):
    parts = Parts(tmp_path)
    parts.append(0, [row("a", 0, True), row("a", 1, False)])
    parts.append(1, [row("b", 0, True, completion="\ud800 half a surrogate\u2028")])
    path = tmp_path / "part-1.jsonl"
    path.write_bytes(path.read_bytes() + b'{"problem_id": "b", "sam')
    assert [(r["problem_id"], r["sample"]) for r in parts.read()] == [("a", 0), ("a", 1), ("b", 0)]
    parts.append(1, [row("b", 1, True)])
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    merged = parts.merge([("b", 1), ("b", 0), ("a", 0), ("a", 1)])
    assert read_records(tmp_path) == merged
    assert merged[1]["completion"] == "\ud800 half a surrogate\u2028"
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


@pytest.mark.parametrize("samples", [[("a", 0)], [("a", 0), ("a", 0)], [("a", 0), ("a", 1), ("b", 0)]])
def test_lost_and_doubled_samples_are_refused(tmp_path, samples):
    parts = Parts(tmp_path)
    parts.append(0, [row(problem, number, True) for problem, number in samples])
    with pytest.raises(ValueError, match="2 were expected"):
        parts.merge([("a", 0), ("a", 1)])
    assert not (tmp_path / "records.jsonl").exists()


def test_of_a_sample_that_is_there_twice_the_first_counts(tmp_path):
    parts = Parts(tmp_path)
    parts.append(0, [row("a", 0, True), row("a", 1, True)])
    parts.append(1, [row("a", 1, False)])
    assert [r["correct"] for r in parts.merge([("a", 0), ("a", 1)])] == [True, True]


def test_a_second_writer_is_refused(tmp_path):
    with Parts(tmp_path).writing(0):
        with Parts(tmp_path).writing(1):
            pass
        with pytest.raises(ValueError, match="another evaluation is writing here"), Parts(tmp_path).writing(0):
            pass
    with Parts(tmp_path).writing(0):
        pass


LINES = {
    '{"problem': "not JSON",
    "5": "is 5 and no record",
    "null": "is null and no record",
    '["a"]': "is .* and no record",
    '{"a": 1}': "a record without a proper problem_id, sample, correct, completion, finish_reason, tokens, evictions",
    json.dumps(row("a", True, True)): "without a proper sample",
    json.dumps(row("a", 0, None)): "without a proper correct",
    json.dumps(row(["a"], 0, True)): "without a proper problem_id",
    json.dumps(row("a", 0, True, finish_reason="tired")): "without a proper finish_reason",
    json.dumps(row("a", 0, True, gold_note=5, sample_seed="7")): "without a proper gold_note, sample_seed",
    "\xff": "not JSON",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", ["part-0.jsonl", "records.jsonl"])
def test_a_line_that_is_no_record_is_named_by_file_and_number(tmp_path, line, name):
    good = json.dumps(row("a", 0, True))
    (tmp_path / name).write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}, line 2: (a record )?{LINES[line]}.*; remove the line"):
        Parts(tmp_path).read() if name == "part-0.jsonl" else read_records(tmp_path)


def test_records_from_before_there_was_a_schema_are_read(tmp_path):
    old = row("a", 0, True)
    del old["schema"]
    (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n")
    assert read_records(tmp_path) == [row("a", 0, True, schema=1)]


def test_records_of_another_schema_are_refused(tmp_path):
    """Their keys may mean something else, so no metric is computed from them."""
    write_records(tmp_path, [row("a", 0, True), row("a", 1, True, schema=SCHEMA + 1, pte_trl="9.0")])
    with pytest.raises(
        ValueError, match=rf"line 2: schema={SCHEMA + 1}, .* reads {SCHEMA}; use the version .*\(9\.0\)"
    ):
        read_records(tmp_path)


def test_a_full_disk_is_named_and_costs_no_record(tmp_path):
    """A limit on the size of files, which refuses a write as a full disk does."""
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(tmp_path, theirs))
    child.start()
    said = [mine.recv() for _ in range(2)]
    child.join()
    assert said[0].startswith(f"{tmp_path}/part-0.jsonl: could not be written (File too large); the records that are")
    assert said[1].startswith(f"{tmp_path}/records.tmp: could not be written (File too large)")
    assert [r["sample"] for r in Parts(tmp_path).read()] == [0]  # the half line is cut off
    assert Parts(tmp_path).merge([("a", 0)]) == read_records(tmp_path)


def fill_the_disk(folder, found) -> None:
    parts = Parts(folder)
    parts.append(0, [row("a", 0, True)])
    for limit, write in (
        (250, lambda: parts.append(0, [row("a", 1, True)])),
        (100, lambda: parts.merge([("a", 0)])),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write()
        except Fault as fault:
            found.send(str(fault))


def test_an_unfinished_evaluation_has_no_records(tmp_path):
    Parts(tmp_path).append(0, [row("a", 0, True)])
    with pytest.raises(FileNotFoundError, match="1 parts of an unfinished one"):
        read_records(tmp_path)
    write_records(tmp_path, [row("a", 0, True)])
    assert read_records(tmp_path) == [row("a", 0, True)]
