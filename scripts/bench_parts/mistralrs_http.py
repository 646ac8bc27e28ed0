"""A thin HTTP server around mistral.rs' Python wheel, with streamed completions only: what the benchmark needs to
ask it like the others. Runs in the environment that has `mistralrs`: PORT, model folder, adapter folders."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

port, model, *adapters = sys.argv[1:]
named = [LoraAdapter(f"t{number}", folder) for number, folder in enumerate(adapters)]
if named:
    which = Which.Lora(model, adapters=named, arch=Architecture.Llama, max_adapters=len(named), dtype=ModelDType.F32)
else:
    which = Which.Plain(model, arch=Architecture.Llama, dtype=ModelDType.F32)
# The prompt is all there is: no system text around it, so that prompts have the tokens that were asked for.
plain = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
template = f"{model}/plain-template.jinja"
with open(template, "w") as file:
    file.write(plain)
runner = Runner(which, max_seqs=32, prefix_cache_n=0, jinja_explicit=template)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        adapter = body["model"] if body["model"] != "base" else None
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": body["prompt"]}], model="default", max_tokens=body["max_tokens"],
            temperature=0.0, stream=True, ignore_eos=True, adapter=adapter)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        n_texts, usage = 0, None
        for chunk in runner.send_chat_completion_request(request):
            text = chunk.choices[0].delta.content if chunk.choices else None
            usage = getattr(chunk, "usage", None) or usage
            if text:
                n_texts += 1
                self.event(json.dumps({"choices": [{"index": 0, "text": text}]}))
        counts = {"prompt_tokens": usage.prompt_tokens if usage else 0,
                  "completion_tokens": usage.completion_tokens if usage else n_texts}
        self.event(json.dumps({"choices": [], "usage": counts}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data):
        raw = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


Server(("127.0.0.1", int(port)), Handler).serve_forever()
