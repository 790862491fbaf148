"""Checks that what a run needs from the Hugging Face hub is available: all names at once, before anything loads.

    reachable(HubName("Qwen/Qwen2.5-3B-Instruct", "model", "model_name_or_path='Qwen/...'", "it to a folder"))

The libraries that load models and datasets try an unreachable hub again and again, file by file, for minutes. Here
one request has `LIMIT` seconds. A repository in the local cache needs no hub: without the hub, the libraries are
set to read the cache at once.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from pte_trl.compat.hub import datasets_cache, set_offline

LIMIT = 6.0  # seconds for one answer of the hub, in total: name lookup, connection, answer
FRESH = 600.0  # seconds that an answer counts: a start looks at a name in several places, and asks once

# The file that every repository of a kind has; in the cache it shows that the repository was loaded before.
_FIRST_FILE = {"model": "config.json", "adapter": "adapter_config.json", "dataset": "README.md"}

# Address of the hub, kind and name of a repository -> when it answered.
_answered: dict[tuple[str, str, str], float] = {}


@dataclass(frozen=True)
class HubName:
    """A repository that a setting names.

    Args:
        repo_id: OWNER/NAME.
        kind: model, adapter or dataset.
        setting: the setting as it was given, "adapter='owner/name'".
        advice: what can be set instead, "data_dir to a folder with ...".
    """

    repo_id: str
    kind: str
    setting: str
    advice: str

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"

    @property
    def key(self) -> tuple[str, str, str]:
        return huggingface_hub.HfApi().endpoint, self.repo_type, self.repo_id

    def missing(self) -> str:
        return (
            f"{self.setting}: there is no such folder here, and no {self.repo_type} {self.repo_id} on the hub; "
            f"check the name, or set {self.advice}"
        )

    def closed(self, status: int) -> str:
        return (
            f"{self.setting}: the hub denies access to {self.repo_id} (it answers {status}): it is gated, private or "
            f"missing; ask for access on its page and log in with `hf auth login` or HF_TOKEN, or set {self.advice}"
        )

    def unreachable(self, why: str) -> str:
        return (
            f"{self.setting}: {self.repo_id} is not in the local cache, and the Hugging Face hub cannot be reached "
            f"({' '.join(why.split())[:200]}); set {self.advice}, or load it once where the hub can be reached: with "
            "HF_HUB_OFFLINE=1 the cache is then enough"
        )


def is_local(name: str, key: str) -> bool:
    """Whether the setting `key` names a folder here.

    Raises:
        FileNotFoundError: by its form it can only be a folder, and there is none.
        ValueError: it is no name that the hub could have.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or path.exists():
        raise FileNotFoundError(f"{key}={name!r}: no such folder")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{key}={name!r}: neither a folder here nor OWNER/NAME on the hub ({error})") from None
    return False


def is_cached(hub: HubName) -> bool:
    """Whether a repository was loaded before and can be again, without the hub."""
    found = huggingface_hub.try_to_load_from_cache(hub.repo_id, _FIRST_FILE[hub.kind], repo_type=hub.repo_type)
    if isinstance(found, str):
        return True
    if hub.kind != "dataset":
        return False
    # datasets keeps what it has made of a repository under this name, and loads it by a fall-back of its own.
    name = hub.repo_id.replace("/", "___").lower()
    return any(path.name.lower().replace("_", "") == name.replace("_", "") for path in datasets_cache().glob("*"))


def reachable(*hubs: HubName) -> None:
    """Returns if every repository can be had, from the hub or the cache; a process asks once for each name.

    Raises:
        FileNotFoundError: the hub has no such repository.
        PermissionError: it denies access to one.
        ConnectionError: the hub cannot be reached, or fails, and the repository is not in the cache.
    """
    fresh = {key for key, when in _answered.items() if time.monotonic() - when < FRESH}
    cached = [hub for hub in hubs if is_cached(hub)]
    for hub in hubs:
        if hub not in cached and hub.key not in fresh:
            ask(hub)
            _answered[hub.key] = time.monotonic()
    answers = {address for address, *_ in fresh}
    if cached and len(cached) == len(hubs) and not is_offline() and cached[0].key[0] not in answers:
        try:
            ask(cached[0])
        except ConnectionError as error:
            return go_offline(str(error.__cause__))
        except (FileNotFoundError, PermissionError):
            pass  # the hub answers; the libraries take what is cached where they must
        _answered[cached[0].key] = time.monotonic()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return huggingface_hub.is_offline_mode()


def go_offline(why: str) -> None:
    """From now on the libraries read the cache without asking the hub, as with HF_HUB_OFFLINE=1; printed."""
    print(f"the Hugging Face hub cannot be reached ({why}); all is in the local cache, which is used", flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
    set_offline()


def ask(hub: HubName) -> None:
    """One question to the hub, at most `LIMIT` seconds; raises as `reachable`."""
    api = huggingface_hub.HfApi()

    def question() -> None:
        info = api.repo_info(hub.repo_id, repo_type=hub.repo_type, timeout=LIMIT)
        if getattr(info, "gated", False):  # its page is open to all, its files are not
            api.auth_check(hub.repo_id, repo_type=hub.repo_type)

    try:
        within(LIMIT, question)
    except OfflineModeIsEnabled as error:
        raise ConnectionError(hub.unreachable("HF_HUB_OFFLINE=1 is set")) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(hub.closed(status)) from error
        if status == 404:
            raise FileNotFoundError(hub.missing()) from error
        raise ConnectionError(hub.unreachable(f"it answers {status}")) from error
    except Exception as error:  # httpx's, the system's, or of a server that is no hub: none of them is an answer
        raise ConnectionError(hub.unreachable(str(error) or type(error).__name__)) from error


def within(seconds: float, call: Callable[[], None]) -> None:
    """Calls in a thread that nobody waits for any longer: no timeout of a client covers the lookup of a name.

    Raises:
        TimeoutError: it took longer.
        Exception: what the call raised.
    """
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not raised:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if raised[0] is not None:
        raise raised[0]
