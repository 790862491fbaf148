r"""Files of every kind, and hostile ones: what is used is read as it was written, or named with file and line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pte_trl.data.files import ENDINGS, open_table
from pte_trl.data.problems import load_problems
from pte_trl.data.sources import MEANINGLESS, number, plain

ROWS = [
    {"id": "a", "problem": 'Is "1,1" a pair,\nor two?', "answer": "2"},
    {"id": "b", "problem": "Größe von \u2028 $\\frac{1}{2}$?", "answer": "0.10"},
]
EXPECTED = ROWS


def cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def text_of(kind: str, rows=ROWS) -> str:
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False)
    comma = {".csv": ",", ".tsv": "\t"}[kind]
    return "".join(comma.join(map(cell, line)) + "\r\n" for line in [rows[0].keys(), *(row.values() for row in rows)])


def write(path, rows=ROWS, encoding="utf-8"):
    kind = path.name[path.name.index(".") :]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = text_of(kind.removesuffix(".gz"), rows).encode(encoding)
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


# ---- every kind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENDINGS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = write(tmp_path / f"mine{kind}")
    assert load_problems(str(path)).to_list() == EXPECTED
    assert load_problems("mine", data_dir=tmp_path).to_list() == EXPECTED
    assert load_problems("org/mine", data_dir=tmp_path).to_list() == EXPECTED
    assert load_problems(str(tmp_path)).to_list() == EXPECTED
    (problem,) = load_problems(str(path), answer_column="problem", problem_column="answer", limit=1)["answer"]
    assert problem == ROWS[0]["problem"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_byte_order_mark_says_the_encoding_and_lines_end_either_way(tmp_path, kind, encoding, ends):
    rows = [{**row, "problem": row["problem"].replace("\n", " ")} for row in ROWS]
    text = text_of(kind, rows).replace("\r\n", "\n").replace("\n", ends)
    (tmp_path / f"mine{kind}").write_bytes(text.encode(encoding))
    assert load_problems("mine", data_dir=tmp_path).to_list() == rows


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", r"line \d: not UTF-8 \(byte 0xf6\); allowed are UTF-8, and UTF-16"),
        ("cp1252", r"line \d: not UTF-8"),
        ("utf-16-le", "line 1: holds a zero byte, as UTF-16 without its mark does; allowed are"),
        ("utf-16-be", "line 1: holds a zero byte, as UTF-16 without its mark does; allowed are"),
    ],
)
def test_another_encoding_is_named_with_file_and_line(tmp_path, kind, encoding, message):
    rows = [ROWS[0], {**ROWS[1], "problem": "Größe"}]
    write(tmp_path / f"mine{kind}", rows, encoding)
    with pytest.raises(ValueError, match=rf"mine\{kind}, {message}"):
        load_problems("mine", data_dir=tmp_path)


# ---- columns that nobody uses ----------------------------------------------------------------------------------

UNUSED = [
    '"level": 1',
    '"level": "Level 5"',
    '"uid": 1180591620717411303424',
    f'"uid": {"9" * 5000}',
    '"x": "\\ud800"',
    '"\\udc00": 1',
    '"x": NaN, "y": [Infinity, -Infinity]',
    '"x": {"deep": [{"er": 1, "er": 2}]}',
    '"x": 1, "x": "two"',
    '"x": 1e400',
    '"x": null, "": true',
]


def test_what_stands_in_a_column_that_nobody_uses_does_not_matter(tmp_path):
    lines = [f'{{"problem": "{n}?", "answer": "{n}", {more}}}\n' for n, more in enumerate(UNUSED)]
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    (tmp_path / "array.json").write_text(f"[{','.join(lines)}]")
    for name in ("mine", "array"):
        loaded = load_problems(name, data_dir=tmp_path)
        assert list(loaded["answer"]) == [str(n) for n in range(len(UNUSED))]
        assert loaded.column_names == ["id", "problem", "answer"]
        with pytest.raises(ValueError, match=r"no answer_column='gold'; columns there: problem, answer, level, uid"):
            load_problems(name, data_dir=tmp_path, answer_column="gold")
    rows = [{"problem": "p", "answer": 27.0, "x": float("nan"), "y": [{"z": 1}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed.parquet")
    assert load_problems("mixed", data_dir=tmp_path)["answer"][0] == "27"


# ---- values that are used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["problem", "answer"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((value, f"{value} is no number") for value in ("NaN", "Infinity", "-Infinity")),
        *((json.dumps(text), "for a missing value") for text in sorted(MEANINGLESS)),
        *((json.dumps(text), "for a missing value") for text in ("NA", "NaN", "None", "N/A", "NULL", " nan\n")),
        *((json.dumps(text), "is empty") for text in ("", " \n", "\u200b", "\ufeff \u2060", "\u00a0", "\u0000")),
        ("null", "is empty"),
        *((value, "is a bool; text or a number") for value in ("true", "false")),
        ('["1"]', "is a list; text or a number"),
        ("[]", "is a list; text or a number"),
        ('{"a": 1}', "is a mapping"),
        ("1e400", "1e400 is no finite number"),
        ('"\\ud835"', "holds half a surrogate pair"),
    ],
)
def test_a_value_that_says_nothing_is_refused_with_its_line(tmp_path, column, value, message):
    other = "answer" if column == "problem" else "problem"
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"problem": "p", "answer": "1"}}\n{{"{column}": {value}, "{other}": "1"}}\n')
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: {column}.*(?:{message})"):
        load_problems(str(path))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("27.0", "27"),
        ("-27.00", "-27"),
        ("0.10", "0.10"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("1e3", "1000"),
        ("4.5e33", "4.5e33"),
        ("1e-400", "1e-400"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("9007199254740993", "9007199254740993"),
        ("1180591620717411303424", "1180591620717411303424"),
        ("7" * 5000, "7" * 5000),
        ('" 0.10 "', "0.10"),
        ('"\\ufeff5\\u200b"', "5"),
        ('"Infinity"', "Infinity"),
        ('"Na"', "Na"),
        ('"\\ud835\\udfd3"', "\U0001d7d3"),
    ],
)
def test_a_number_keeps_its_digits(tmp_path, written, read):
    (tmp_path / "mine.jsonl").write_text(f'{{"problem": "p", "answer": {written}}}')
    assert load_problems("mine", data_dir=tmp_path)["answer"][0] == read


def test_numbers_of_python():
    values = [27.0, 0.1, 1e22, 123456789012345678, -0.0, 1e-7]
    assert [plain(value) for value in values] == ["27", "0.1", "1e+22", "123456789012345678", "0", "1e-07"]
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="is no finite number"):
            plain(value)
    assert number("1E+2") == "100"


# ---- files that are damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"problem": "p", "answer": "1"}\n{"problem": "p", "answer": "1",}\n', "line 2: not JSON"),
        ("a.jsonl", '{"problem": "p", "answer": "1", "answer": "2"}', "line 1: answer occurs in it more than once"),
        ("a.jsonl", '[{"problem": "p", "answer": "1"}]', r"line 1: must be a JSON object, is a list; .*\.json file"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON that can be read"),
        ("a.jsonl", '{"problem": "p", "answer": "1"} {"problem": "p", "answer": "1"}', "line 1: not JSON .Extra data"),
        ("a.jsonl", "5\n", "line 1: must be a JSON object, is a int"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "\n \r\n", "holds no rows"),
        ("a.json", '[{"problem": "p", "answer": "1"},]', "not JSON .*line 1 column"),
        ("a.json", '[{"problem": "p"}, {"problem": "p", "answer": "nan"}]', "row 0: answer is empty"),
        ("a.json", '[{"problem": "p", "answer": "1"}, 5]', "row 1: must be a JSON object, is a int"),
        (
            "a.json",
            '{"problem": "p",\n "answer": "1"}',
            "line 1: not JSON .*holds an array of objects",
        ),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "problem,answer\np,1\np,1,2\n", "line 3: has 3 cells where the header has 2"),
        ("a.csv", 'problem,answer\n"p\nq",1\np\n', "line 4: has 1 cells where the header has 2"),
        ("a.csv", 'problem,answer\np,"1\n', "line 2: not CSV .unexpected end of data"),
        ("a.csv", "problem,answer,answer\np,1,2\n", "line 2: answer occurs in it more than once"),
        ("a.csv", "problem;answer\np;1\n", "no problem_column='problem'; columns there: problem;answer"),
        ("a.csv", "problem,answer\np,nan\n", "line 2: answer: 'nan' is what programs write for a missing value"),
        ("a.csv", "problem,answer\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.tsv", "problem\tanswer\np\t1\nq\n", "line 3: has 1 cells"),
        ("a.parquet", "problem,answer\np,1\n", "not a Parquet file"),
        ("a.parquet", "", "not a Parquet file"),
        ("a.jsonl.gz", "no gzip", r"not a complete \.gz file"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_problems(str(tmp_path / name))


def test_cut_files_and_long_cells(tmp_path):
    for kind in (".jsonl.gz", ".parquet"):
        path = write(tmp_path / f"mine{kind}")
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=rf"mine\{kind}: not a"):
            load_problems(str(path))
    (tmp_path / "long.csv").write_text(f"problem,answer\n{'p' * 300_000},1\n")
    assert len(load_problems("long", data_dir=tmp_path)["problem"][0]) == 300_000


def test_places_are_those_of_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('problem,answer\n\n"p\nq",1\n\nr,2\n')
    assert open_table(tmp_path / "a.csv", ["answer"]).places == [f"{tmp_path / 'a.csv'}, line {n}" for n in (3, 6)]
    pq.write_table(pa.table({"problem": ["p", "q"], "answer": [1.0, float("nan")]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet, row 1: answer: nan is no finite number"):
        load_problems("b", data_dir=tmp_path)


# ---- names -----------------------------------------------------------------------------------------------------


def test_what_exists_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write(tmp_path / "org/set.csv")
    assert load_problems("org/set.csv").to_list() == EXPECTED
    (tmp_path / "org/set.txt").write_text("p 1")
    with pytest.raises(ValueError, match=r"dataset_name='org/set\.txt': .*must end in \.jsonl, \.json, \.csv"):
        load_problems("org/set.txt")
    with pytest.raises(FileNotFoundError, match=r"org/other\.csv: no such file; other files there: set\.csv"):
        load_problems("org/other.csv")
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"):
        with pytest.raises(FileNotFoundError, match=rf"dataset_name={name!r}: no such folder"):
            load_problems(name)
    with pytest.raises(ValueError, match=r"'org/a b': neither a folder here nor OWNER/NAME"):
        load_problems("org/a b")


def test_a_folder_with_several_files_names_them(tmp_path):
    write(tmp_path / "one.csv"), write(tmp_path / "two.parquet"), write(tmp_path / "two.jsonl")
    with pytest.raises(ValueError, match=r"exactly one file of .*, holds one\.csv, two\.jsonl, two\.parquet"):
        load_problems(str(tmp_path))
    with pytest.raises(ValueError, match=r"data_dir=.*: holds two\.jsonl, two\.parquet; keep one of them"):
        load_problems("two", data_dir=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"three\.jsonl: no such file, nor .*; other files there: one\.csv, two"
    ):
        load_problems("three", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_dir='.*nowhere': no such folder"):
        load_problems("one", data_dir=tmp_path / "nowhere")
