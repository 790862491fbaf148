"""Hub names: what is missing, not open or not reachable is refused in one sentence, within seconds."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from pte_trl.data.decontaminate import load_eval_problems
from pte_trl.data.needs import check_needs, needs
from pte_trl.data.problems import load_problems
from pte_trl.data.sources import BENCHMARKS, DATASETS
from pte_trl.models import hub

MODEL = hub.HubName("org/model", "model", "model_name_or_path='org/model'", "model_name_or_path to a folder")


class Server(BaseHTTPRequestHandler):
    """Answers every request with the server's `status`; 0 is no answer at all, -1 a byte now and then."""

    def do_GET(self):
        self.server.asked.append(self.path)
        status = self.server.status
        if status <= 0:
            end = time.monotonic() + 10
            while time.monotonic() < end and not self.server.closing:
                if status == -1:
                    self.wfile.write(b"H")
                time.sleep(0.05)
            return
        about = {"id": "org/model"} | ({"gated": "auto"} if self.server.gated else {})
        body = json.dumps(about if status == 200 else {}).encode()
        if self.path.endswith("/auth-check"):
            status = 403
        self.send_response(status)
        if status == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub of our own, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.status, server.asked, server.closing = True, 404, [], False
    server.gated = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    elsewhere(monkeypatch, tmp_path, server.server_address[1])
    yield server
    server.closing = True
    server.shutdown()
    server.server_close()


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """A hub at a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elsewhere(monkeypatch, tmp_path, port)


def elsewhere(monkeypatch, tmp_path, port: int) -> None:
    """What HF_ENDPOINT and HF_HOME set when the libraries are imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "LIMIT", 0.5)
    monkeypatch.setattr(hub, "_answered", {})
    monkeypatch.chdir(tmp_path)


def cache(tmp_path, name: str, file: str) -> None:
    """A repository as the hub's own cache keeps it."""
    folder = tmp_path / "hub" / name
    for path, text in (("refs/main", "abc"), (f"snapshots/abc/{file}", "{}")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


CLOSED = r"the hub denies access to org/model \(it answers {}\): it is gated, private or missing"
AWAY = "hub cannot be reached "
SAID = {
    404: (FileNotFoundError, "there is no such folder here, and no model org/model on the hub; check the name, or"),
    401: (PermissionError, CLOSED.format(401)),
    403: (PermissionError, CLOSED.format(403)),
    200: (PermissionError, CLOSED.format(403)),  # a gated model: its page is open, its files are not
    500: (ConnectionError, rf"{AWAY}\(it answers 500\)"),
    503: (ConnectionError, rf"org/model is not in the local cache, and .* {AWAY}\(it answers 503\); set model"),
    429: (ConnectionError, rf"{AWAY}\(it answers 429\)"),
    0: (ConnectionError, rf"{AWAY}\(.*(timed out|no answer within)"),
    -1: (ConnectionError, AWAY),
}


@pytest.mark.parametrize("status", SAID)
def test_every_answer_is_one_sentence_in_time(server, status):
    server.status, (kind, message) = status, SAID[status]
    start = time.monotonic()
    with pytest.raises(kind, match=f"^model_name_or_path='org/model': .*{message}") as raised:
        hub.reachable(MODEL)
    assert time.monotonic() - start < 2 and "\n" not in str(raised.value)
    assert len(server.asked) <= 2, "no retries"


def test_a_refused_port_is_an_unreachable_hub(refused):
    with pytest.raises(ConnectionError, match=r"cannot be reached \(.*[Cc]onnection refused.*HF_HUB_OFFLINE=1"):
        hub.reachable(MODEL)


def test_what_is_cached_is_reachable_and_the_libraries_read_the_cache(refused, tmp_path, capsys):
    cache(tmp_path, "models--org--model", "config.json")
    hub.reachable(MODEL)
    assert "hub cannot be reached" in capsys.readouterr().out
    assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError, match=r"org/other is not in the local cache.*HF_HUB_OFFLINE=1 is set"):
        hub.reachable(hub.HubName("org/other", "adapter", "adapter='org/other'", "adapter to a folder"))


def test_a_cached_model_with_the_hub_there_changes_nothing(server, tmp_path):
    cache(tmp_path, "models--org--model", "config.json")
    hub.reachable(MODEL)
    assert server.asked == ["/api/models/org/model"] and not huggingface_hub.is_offline_mode()


def test_a_start_asks_once_for_each_name(server, tmp_path, monkeypatch):
    """Settings, model, data and benchmarks are looked at in turn."""
    server.status, server.gated = 200, False
    other = hub.HubName("org/data", "dataset", "dataset_name='org/data'", "data_dir to a folder")
    for names in ((MODEL, other), (MODEL,), (other,), (MODEL,)):
        hub.reachable(*names)
    assert server.asked == ["/api/models/org/model", "/api/datasets/org/data"]
    cache(tmp_path, "models--org--model", "config.json")
    hub.reachable(MODEL)
    assert len(server.asked) == 2, "the hub has answered a moment ago"
    monkeypatch.setattr(hub, "FRESH", 0.0)
    hub.reachable(MODEL)
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_in_the_cache_of_datasets_is_known(refused, tmp_path, name):
    """The folder's name is datasets' own."""
    repo_id = DATASETS[name].hub_id
    there = hub.HubName(repo_id, "dataset", f"dataset_name={name!r}", "data_dir")
    assert not hub.is_cached(there)
    files = datasets.data_files.DataFilesList([f"hf://datasets/{repo_id}@abc/rows.json"], origin_metadata=[("abc",)])
    made = datasets.load.import_main_class("datasets.packaged_modules.json.json")(
        cache_dir=str(tmp_path / "datasets"),
        repo_id=repo_id,
        dataset_name=repo_id.split("/")[1],
        data_files=datasets.data_files.DataFilesDict({"train": files}),
    )
    (tmp_path / "datasets" / made._relative_data_dir(with_hash=False)).mkdir(parents=True)
    assert hub.is_cached(there)


def test_a_start_asks_for_every_name_and_stops_at_the_first(server, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "mine.jsonl").write_text("")
    script = SimpleNamespace(
        model_name_or_path="org/m", adapter="org/a", dataset_name="gsm8k_train", decontaminate=True
    )
    keys = [each.setting.split("=")[0] for each in needs(script)]
    assert keys == ["model_name_or_path", "adapter", "dataset_name"]
    with pytest.raises(FileNotFoundError, match=r"^model_name_or_path='org/m'"):
        check_needs(script)
    assert len(server.asked) == 1
    for change, key in (
        ({"model_name_or_path": "base"}, "adapter='org/a'"),
        ({"adapter": None}, "dataset_name='gsm8k_train'"),
        (
            {"dataset_name": "mine.jsonl"},
            "decontaminate=true: the Hugging Face hub does not give access to Hugging",
        ),
        ({"data_dir": str(tmp_path), "benchmarks": ["org/x"]}, r"data_dir.*|.*x\.jsonl"),
    ):
        vars(script).update(change)
        with pytest.raises(FileNotFoundError, match=f"^{key}"):
            check_needs(script)
    local = SimpleNamespace(
        model_name_or_path="base", dataset_name="mine.jsonl", decontaminate=False, completions=None
    )
    assert needs(local) == []


@pytest.mark.parametrize("key", ["model_name_or_path", "adapter", "benchmarks"])
@pytest.mark.parametrize(
    "name", ["./no", "/no/where", "~/no-where", "a/b/c", "org/", "a b", "org/a b", "-x", "org/x--y"]
)
def test_what_can_be_no_hub_name_is_said_without_asking(server, key, name):
    if key == "benchmarks" and "/" not in name:
        return  # load_problems lists the known names then
    script = SimpleNamespace(model_name_or_path=".", **{key: [name]} if key == "benchmarks" else {})
    setattr(script, key, [name] if key == "benchmarks" else name)
    with pytest.raises((FileNotFoundError, ValueError), match=f"^{key}='{name}': (no such folder|neither a folder)"):
        check_needs(script)
    assert server.asked == []


def test_datasets_and_benchmarks_say_what_to_set(server):
    server.status = 0
    with pytest.raises(ConnectionError, match=r"dataset_name='org/set': .*set data_dir to a folder with set\.jsonl"):
        load_problems("org/set")
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        load_eval_problems()
    assert time.monotonic() - start < 1.5, "an unreachable hub is waited for once, not once a benchmark"
    assert all(DATASETS[name].hub_id in str(raised.value) for name in BENCHMARKS)
    assert "decontaminate=true: the Hugging Face hub cannot be reached" in str(raised.value)
    assert "set data_dir to a folder" in str(raised.value) and "or decontaminate: false" in str(raised.value)
    server.status = 404
    with pytest.raises(
        FileNotFoundError, match=r"hub does not give access to HuggingFaceH4/MATH-500, .*math-ai/aime25; set"
    ):
        load_eval_problems()
