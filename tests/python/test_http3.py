"""The HTTP API over HTTP/3, asked by a client that is not ours (aioquic)."""

import asyncio
import datetime
import ipaddress
import json
import socket

import pytest
from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from conftest import Node


def certificate(folder):
    """A self-signed certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tenantry test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    (folder / "node.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "node.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "node.pem"


def free_udp_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def http3_node(tmp_path_factory):
    folder = tmp_path_factory.mktemp("http3")
    ca = certificate(folder)
    node = Node(folder, '[tls]\ncertificate = "node.pem"\nkey = "node.key"\n', quic=free_udp_port(), ca=ca)
    yield node
    assert node.stop() == 0, (node.folder / "node.log").read_text()[-4000:]


class Http3(QuicConnectionProtocol):
    """One connection; each request gathers its own events."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.waiting = {}

    def quic_event_received(self, event):
        for seen in self.http.handle_event(event):
            if isinstance(seen, (HeadersReceived, DataReceived)) and seen.stream_id in self.waiting:
                self.waiting[seen.stream_id].put_nowait(seen)

    async def ask(self, method, path, key, body=None):
        stream = self._quic.get_next_available_stream_id()
        self.waiting[stream] = asyncio.Queue()
        headers = [
            (b":method", method.encode()),
            (b":scheme", b"https"),
            (b":authority", b"127.0.0.1"),
            (b":path", path.encode()),
            (b"authorization", f"Bearer {key}".encode()),
            (b"content-type", b"application/json"),
        ]
        self.http.send_headers(stream, headers, end_stream=body is None)
        if body is not None:
            self.http.send_data(stream, json.dumps(body).encode(), end_stream=True)
        self.transmit()
        status, pieces = None, []
        while True:
            event = await asyncio.wait_for(self.waiting[stream].get(), 30)
            if isinstance(event, HeadersReceived):
                status = int(dict(event.headers)[b":status"])
            else:
                pieces.append(event.data)
            if event.stream_ended:
                return status, pieces


def run(node, work):
    async def connected():
        configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, cafile=str(node.ca))
        configuration.server_name = "127.0.0.1"
        async with connect("127.0.0.1", node.quic, configuration=configuration, create_protocol=Http3) as client:
            return await work(client)

    return asyncio.run(connected())


def body(**more):
    return {"model": "smollm2", "prompt": "The sea is", "max_tokens": 24, "temperature": 0, **more}


def test_answers_are_those_of_http_1(http3_node):
    key = http3_node.tenant("acme", "--allow-base", "true")
    over_tcp = http3_node.post("/v1/completions", key, body())

    async def work(client):
        status, pieces = await client.ask("POST", "/v1/completions", key, body())
        assert status == 200
        whole = json.loads(b"".join(pieces))
        assert whole["choices"][0]["text"] == over_tcp["choices"][0]["text"]
        status, pieces = await client.ask("POST", "/v1/completions", key, body(stream=True))
        events = b"".join(pieces).decode().split("\n\n")
        assert status == 200 and events[-2] == "data: [DONE]"
        assert len(pieces) > 5, "a stream comes in pieces"
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]]
        assert "".join(texts) == over_tcp["choices"][0]["text"]
        # Many on one connection.
        both = await asyncio.gather(*(client.ask("POST", "/v1/completions", key, body()) for _ in range(8)))
        assert {status for status, _ in both} == {200}

    run(http3_node, work)


def test_strangers_are_refused_as_over_tcp(http3_node):
    async def work(client):
        status, pieces = await client.ask("POST", "/v1/completions", "tnt_nobody", body())
        assert status == 401 and json.loads(b"".join(pieces))["error"]["code"] == "invalid_api_key"
        status, _ = await client.ask("GET", "/healthz", "")
        assert status == 200

    run(http3_node, work)
