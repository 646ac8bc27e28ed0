"""A real node with the real model and three tenants, started once for all tests of this folder."""

import json
import os
import pathlib
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = os.environ.get("TENANTRY_BIN", str(ROOT / "target/debug/tenantry"))
MODEL = os.environ.get("TENANTRY_MODEL", os.path.expanduser("~/.cache/tenantry/SmolLM2-135M-Instruct.Q4_1.gguf"))
DATA = ROOT / "tests/data/adapters"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Node:
    """One running node and the commands to operate it."""

    def __init__(self, folder, extra="", quic=None, ca=None):
        self.folder = folder
        self.http, self.admin = free_port(), free_port()
        self.quic, self.ca = quic, ca
        self.context = ssl.create_default_context(cafile=str(ca)) if ca else None
        clients_quic = f'clients_quic = "127.0.0.1:{quic}"' if quic else ""
        self.config = folder / "cluster.toml"
        self.config.write_text(
            f"""
[[nodes]]
name = "a"
http = "127.0.0.1:{self.http}"
admin = "127.0.0.1:{self.admin}"
data = "data"
{clients_quic}

[[bases]]
name = "smollm2"
path = "{MODEL}"
aliases = ["SmolLM2-135M-Instruct"]
{extra}
"""
        )
        self.log = open(folder / "node.log", "w")
        self.process = subprocess.Popen(
            [BIN, "node", "--config", str(self.config), "--name", "a"], stdout=self.log, stderr=subprocess.STDOUT
        )
        scheme = "https" if ca else "http"
        self.url = f"{scheme}://127.0.0.1:{self.http}"
        self.admin_url = f"{scheme}://127.0.0.1:{self.admin}"
        self.wait_ready()

    def wait_ready(self):
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError("the node ended:\n" + (self.folder / "node.log").read_text()[-4000:])
            try:
                urllib.request.urlopen(self.url + "/readyz", timeout=1, context=self.context)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError("the node is not ready:\n" + (self.folder / "node.log").read_text()[-4000:])

    def ctl(self, *words, ok=True):
        done = subprocess.run(
            [BIN, "ctl", "--config", str(self.config), *(["--ca", str(self.ca)] if self.ca else []), *words],
            capture_output=True, text=True, timeout=60
        )
        if ok:
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout) if done.stdout.count("\n}\n") <= 1 else done.stdout
        return done

    def post(self, path, key, body):
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60, context=self.context) as answer:
            return json.load(answer)

    def tenant(self, name, *words):
        return self.ctl("tenant", "create", name, *words)["key"]["key"]

    def stop(self):
        self.process.terminate()
        code = self.process.wait(timeout=60)
        self.log.close()
        return code


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("node"))
    yield node
    assert node.stop() == 0, (node.folder / "node.log").read_text()[-4000:]


@pytest.fixture(scope="session")
def keys(node):
    """Tenant name → API key; each tenant has one task with a real adapter."""
    tenants = {
        "brightcart": ("support", DATA / "brightcart"),
        "metrix": ("reports", DATA / "metrix-dora"),
        "harbor": ("tracking", DATA / "harbor-logistics.f16.gguf"),
    }
    found = {}
    for tenant, (task, adapter) in tenants.items():
        found[tenant] = node.tenant(tenant, "--task", task, "--task", "later")
        node.ctl("adapter", "upload", f"{tenant}-{task}-smollm2-v1.0.0", str(adapter), "--point")
    return found
