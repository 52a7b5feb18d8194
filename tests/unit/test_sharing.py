"""Saving by method, and the Hugging Face hub: its client against a stand-in on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import skipnet
from skipnet import ModelInfo, SkipNet, UserError
from skipnet.models.registry import Architecture
from skipnet.models.weights import find_weights
from skipnet.sharing import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What the client asks for when it makes a repository, uploads a commit and fetches a file."""

    files: dict[str, bytes]
    gated = "gated/model"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            organization = json.loads(body).get("organization") or "owner"
            self.answer({"url": f"http://{self.headers['Host']}/{organization}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[f"{repo}/{entry['value']['path']}"] = content
            self.answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}",
                    "hookOutput": "",
                }
            )
        else:
            self.answer({"error": f"unknown {path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/"):
            self.answer({"id": path, "sha": COMMIT, "siblings": []})
            return
        owner, name, _, _, file = path.split("/", 4)
        content = self.files.get(f"{owner}/{name}/{file}")
        if f"{owner}/{name}" == self.gated:
            self.answer({}, 403, {"X-Error-Code": "GatedRepo"})
        elif content is None:
            known = any(key.startswith(f"{owner}/{name}/") for key in self.files)
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        else:
            self.reply(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(json.dumps(value).encode(), status, headers or {})

    def reply(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def python(code: str, endpoint: str, folder: Path) -> str:
    """Run code in a process of its own: the client reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def example() -> SkipNet:
    architecture = Architecture(name="cifar_resnet20", gate="rnn", num_classes=3)
    torch.manual_seed(0)
    network = architecture.build().eval()
    network.info = ModelInfo(
        architecture=architecture,
        classes=("a", "b", "c"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_size=(32, 32),
        results={"accuracy": 91.5, "macs_fraction": 0.5, "num_images": 100, "keep_rates": []},
    )
    return network


@pytest.mark.slow
def test_pushed_and_fetched(hub: str, tmp_path: Path) -> None:
    network = example()
    network.save(tmp_path / "mine.safetensors", network.info)
    python(
        "import skipnet; network, _ = skipnet.load('mine.safetensors');"
        "network.push_to_hub('owner/net')",
        hub,
        tmp_path,
    )
    assert set(Hub.files) == {
        "owner/net/model.safetensors",
        "owner/net/README.md",
        "owner/net/config.json",
    }
    card = Hub.files["owner/net/README.md"].decode()
    assert "library_name: skipnet" in card
    assert 'skipnet.load("owner/net")' in card
    assert "91.50 % on test images at 50.0 % of the dense multiply-adds" in card
    assert json.loads(Hub.files["owner/net/config.json"])["architecture"]["gate"] == "rnn"
    python(
        "import skipnet; from skipnet import SkipNet\n"
        "one, info = skipnet.load('owner/net'); one.save('one.safetensors')\n"
        "SkipNet.from_pretrained('owner/net').save('two.safetensors')",
        hub,
        tmp_path,
    )
    whole = (tmp_path / "mine.safetensors").read_bytes()
    assert (tmp_path / "one.safetensors").read_bytes() == whole
    assert (tmp_path / "two.safetensors").read_bytes() == whole
    # From the cache, when there is no hub.
    offline = "import skipnet; print(skipnet.load('owner/net')[1].classes)"
    assert "('a', 'b', 'c')" in python(offline, "http://127.0.0.1:9", tmp_path)


@pytest.mark.slow
def test_what_cannot_be_fetched(hub: str, tmp_path: Path) -> None:
    Hub.files = {"owner/other/README.md": b"not ours"}
    said = python(
        "import skipnet\n"
        "for name in ('owner/nothing', 'owner/other', 'gated/model'):\n"
        "    try: skipnet.load(name)\n"
        "    except skipnet.UserError as error: print(error)\n",
        hub,
        tmp_path,
    ).splitlines()
    assert len(said) == 3
    assert "owner/nothing here, and no model on the Hugging Face hub that you may read" in said[0]
    assert "owner/other on the Hugging Face hub has no model.safetensors" in said[1]
    assert "gated/model needs a login" in said[2]


def test_saved_with_what_it_was_loaded_with(tmp_path: Path) -> None:
    network = example()
    network.save(tmp_path / "one.safetensors", network.info)
    again, info = skipnet.load(tmp_path / "one.safetensors")
    assert again.info == info == network.info
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()
    with torch.no_grad():
        again.gate.project.bias += 1  # type: ignore[union-attr, operator]
    again.save(tmp_path / "three.safetensors")
    assert skipnet.load(tmp_path / "three.safetensors")[1] == replace(info, results={})


def test_a_card_of_other_weights_says_no_results(tmp_path: Path) -> None:
    network = example()
    network.save(tmp_path / "one.safetensors", network.info)
    again, _ = skipnet.load(tmp_path / "one.safetensors")
    again.save_pretrained(tmp_path / "same")
    assert "91.50 %" in (tmp_path / "same" / "README.md").read_text()
    with torch.no_grad():
        again.gate.project.bias += 1  # type: ignore[union-attr, operator]
    again.save_pretrained(tmp_path / "other")
    assert "Not measured" in (tmp_path / "other" / "README.md").read_text()
    assert json.loads((tmp_path / "other" / "config.json").read_text())["results"] == {}


def test_a_defect_of_ours_is_no_error_of_the_hub() -> None:
    with pytest.raises(TypeError):
        example().push_to_hub("owner/net", no_such_option=1)


def test_only_what_can_be_loaded_is_saved(tmp_path: Path) -> None:
    network = example()
    assert network.info is not None
    other = replace(network.info.architecture, gate="ff1")
    with pytest.raises(UserError, match="the network to save is of another architecture"):
        network.save(tmp_path / "model.safetensors", replace(network.info, architecture=other))
    with pytest.raises(UserError, match=r"set network.info"):
        network.fuse().save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_to_a_folder_and_back(tmp_path: Path) -> None:
    network = example()
    network.save_pretrained(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    again = SkipNet.from_pretrained(tmp_path / "folder")
    assert find_weights(tmp_path / "folder") == tmp_path / "folder" / "model.safetensors"
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_nothing_to_say(tmp_path: Path) -> None:
    network = skipnet.create("cifar_resnet20")
    with pytest.raises(UserError, match=r"set network.info to a skipnet.ModelInfo"):
        network.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/net", True),
        ("owner/net-1.0", True),
        ("net", False),
        ("/owner/net", False),
        ("../net", False),
        ("owner/net/file", False),
        ("runs/mine", False),
        ("here/mine", False),
        ("torchvision/resnet18", False),
        (".hidden/net", False),
    ],
)
def test_names_of_the_hub(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(name) == expected
    if not expected:
        assert find_weights(name) == Path(name)
