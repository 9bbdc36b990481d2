"""serve: both APIs over a real socket, bit for bit those of encode; limits, malformed requests, the end."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from support import TEXTS

pytest.importorskip("uvicorn", reason="needs the extra serve")

from onnxsim_embed import Embedder, cos_sim
from onnxsim_embed.serve import Limits, create_app, make_server

PATIENCE = 30  # seconds after which a test has failed
LONG = "the women of the village farm food for the market. " * 9


class Watched(Embedder):
    """An Embedder that records its calls; a closed gate delays its answers."""

    def __init__(self, artifact):
        super().__init__(artifact, precision="fp32", threads=2)
        self.calls, self.gate = [], threading.Event()
        self.gate.set()

    def encode(self, inputs, *args, **kwargs):
        self.calls.append(inputs)
        assert self.gate.wait(PATIENCE)
        return super().encode(inputs, *args, **kwargs)


class Client:
    """Sends requests to a server, by default JSON on a new connection."""

    def __init__(self, port):
        self.port = port

    def send(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        content = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        connection.request(method, path, content, dict(headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response, content

    def post(self, path, body, status=200, **headers):
        response, content = self.send("POST", path, body, headers)
        assert response.status == status, content
        return json.loads(content)

    def embeddings(self, given, **options):
        options = {"model": "tiny", "encoding_format": "base64"} | options
        answer = self.post("/v1/embeddings", {"input": given} | options)
        assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
        rows = [base64.b64decode(row["embedding"]) for row in answer["data"]]
        return np.stack([np.frombuffer(row, "<f4") for row in rows]), answer["usage"]

    def raw(self, content):
        """Send bytes as they are; return the status of the answer, None if the server waits for more."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as connection:
            connection.sendall(content)
            response = http.client.HTTPResponse(connection)
            try:
                response.begin()
            except (TimeoutError, ConnectionError, http.client.HTTPException):
                return None
            return response.status


@contextmanager
def serving(embedder, **options):
    server = make_server(create_app(embedder, **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def model(artifact):
    return Watched(artifact)


@pytest.fixture(scope="module")
def client(model):
    limits = Limits(texts=40, body_bytes=20_000, queue=50, batch_tokens=480)
    with serving(model, limits=limits) as client:
        yield client


@pytest.fixture
def calls(model):
    """The calls of the model in a test; its gate is open after it."""
    model.calls.clear()
    yield model.calls
    model.gate.set()


def wait_for(condition):
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# the same vectors


def test_openai(model, client):
    vectors, usage = client.embeddings(TEXTS)
    np.testing.assert_array_equal(vectors, model.encode(TEXTS))
    count = sum(map(len, model.token_ids(TEXTS)))
    assert usage == {"prompt_tokens": count, "total_tokens": count}
    one, usage = client.embeddings(TEXTS[0], encoding_format="base64", user="me")
    np.testing.assert_array_equal(one[0], vectors[0])
    body = {"input": TEXTS, "model": "tiny", "dimensions": 7, "prompt_name": "query"}
    answer = client.post("/v1/embeddings", body)
    rows = np.array([row["embedding"] for row in answer["data"]], np.float32)
    options = {"truncate_dim": 7, "normalize_embeddings": True, "prompt_name": "query"}
    np.testing.assert_array_equal(rows, model.encode(TEXTS, **options))
    ids = [row.tolist() for row in model.token_ids(TEXTS)]
    np.testing.assert_array_equal(client.embeddings(ids)[0], vectors)
    np.testing.assert_array_equal(client.embeddings(ids[0])[0][0], vectors[0])
    empty = client.post("/v1/embeddings", {"input": [], "model": "tiny"})
    assert (empty["data"], empty["usage"]["total_tokens"]) == ([], 0)


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_text_embeddings_inference(model, client, path):
    rows = np.array(client.post(path, {"inputs": TEXTS}), np.float32)
    np.testing.assert_array_equal(rows, model.encode(TEXTS))
    options = {"normalize": False, "dimensions": 5, "prompt_name": "query", "truncate": True}
    rows = np.array(client.post(path, {"inputs": TEXTS[0], **options}), np.float32)
    np.testing.assert_array_equal(rows[0], model.encode(TEXTS[0], "query", truncate_dim=5))


def test_token_embeddings_and_similarities(model, client):
    rows = client.post("/embed_all", {"inputs": TEXTS[:4], "truncation_direction": "right"})
    expected = model.encode(TEXTS[:4], output_value="token_embeddings")
    for row, states in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(np.array(row, np.float32), states)
    ids = model.token_ids(TEXTS[:1])[0].tolist()
    np.testing.assert_array_equal(
        np.array(client.post("/embed_all", {"inputs": ids})), [expected[0]]
    )
    body = {"source_sentence": TEXTS[0], "sentences": TEXTS}
    scores = client.post("/similarity", {"inputs": body, "parameters": {"prompt_name": "query"}})
    vectors = model.encode(TEXTS, "query")
    np.testing.assert_allclose(scores, cos_sim(vectors[:1], vectors)[0], atol=1e-6)


def test_a_server_of_means(model):
    options = {"long_texts": "mean", "stride": 4}
    with serving(model, name="mine", limits=Limits(batch_tokens=60), **options) as client:
        vectors, usage = client.embeddings([LONG, "x"], model="mine")
        np.testing.assert_array_equal(vectors, model.encode([LONG, "x"], **options))
        assert usage["total_tokens"] > 100
        rows = np.array(client.post("/embed", {"inputs": [LONG], "truncate": True}), np.float32)
        np.testing.assert_array_equal(rows, model.encode([LONG]))
        assert len(client.post("/embed_all", {"inputs": LONG})[0]) == model.max_seq_length
    with pytest.raises(ValueError, match="stride"):
        create_app(model, stride=4)


def test_answers_are_the_same_whatever_else_is_in_flight(model, client, calls):
    pool = random.Random(0)
    text = lambda _: pool.choice(TEXTS) + f" {pool.random():.2}"  # noqa: E731
    given = [list(map(text, range(pool.randint(1, 3)))) for _ in range(80)]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(client.embeddings, given))
    assert len(calls) < 80  # shared
    for texts, (vectors, usage) in zip(given, answers, strict=True):
        np.testing.assert_array_equal(vectors, model.encode(texts))
        assert usage["prompt_tokens"] == sum(map(len, model.token_ids(texts)))


# what is wrong is named


BAD = [
    ("/v1/embeddings", {"model": "tiny"}, 400, "input must be a text"),
    ("/v1/embeddings", {"input": ["a", 5], "model": "tiny"}, 400, "input[1] is invalid"),
    ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "'tiny'"),
    ("/v1/embeddings", {"input": "a"}, 400, "model must be"),
    ("/v1/embeddings", {"input": "a", "model": "tiny", "dimension": 3}, 400, "'dimension'"),
    ("/v1/embeddings", {"input": "a", "model": "tiny", "dimensions": 33}, 400, "dimensions must be from 1 to 32"),
    ("/v1/embeddings", {"input": "a", "model": "tiny", "dimensions": True}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "model": "tiny", "encoding_format": "hex"}, 400, "float or base64"),
    ("/v1/embeddings", {"input": "a", "model": "tiny", "prompt_name": "poem"}, 400, "'poem'"),
    ("/v1/embeddings", {"input": [5, 6, 7], "model": "tiny"}, 400, "special tokens"),
    ("/v1/embeddings", {"input": [[2, 3], []], "model": "tiny"}, 400, "input 1"),
    ("/v1/embeddings", {"input": [2, 3], "model": "tiny", "prompt_name": "query"}, 400, "prompt_name"),
    ("/v1/embeddings", [1], 400, "JSON object"),
    ("/v1/embeddings", b'{"input": "\\ud800", "model": "tiny"}', 400, "not valid JSON"),
    ("/embed", b'{"inputs": "\xff"}', 422, "not valid JSON"),
    ("/embed", b"[" * 9000, 422, "not valid JSON"),
    ("/embed", b"", 422, "not valid JSON"),
    ("/embed", {"inputs": None}, 422, "inputs must be a text"),
    ("/embed", {"inputs": ["a"] * 41}, 413, "40 texts"),
    ("/embed", {"inputs": "a" * 20_001}, 413, "20,000 bytes"),
    ("/embed", {"inputs": ["x", LONG], "truncate": False}, 413, "input 1 has more than 48 tokens"),
    ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 422, "right"),
    ("/embed", {"inputs": ["x", "a" * 3841]}, 413, "3,840 characters"),
    ("/embed_all", {"inputs": ["a"] * 11}, 413, "10 texts"),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": [1]}}, 422, "sentences[0]"),
    ("/similarity", {"inputs": {"sentences": []}}, 422, "source_sentence"),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}, "parameters": 5}, 422, "parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "named"), BAD, ids=range(len(BAD)))
def test_invalid_requests_are_named(client, path, body, status, named):
    answer = client.post(path, body, status)
    message = answer["error"]["message"] if path.startswith("/v1") else answer["error"]
    assert named in message


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/embed", 405), ("POST", "/v2", 404)]
)
def test_unknown_paths_and_methods(client, method, path, status):
    response, content = client.send(method, path)
    assert (response.status, "error" in json.loads(content)) == (status, True)


VALID = {
    "/v1/embeddings": {"input": "a", "model": "tiny"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
}
PATHS = [*VALID, "/embed", "/embed_all", "/", "/metrics", "/%ff", "/v1/\x7f"]


def malformed(seed):
    """A request as bytes, of which something is wrong or at least unusual."""
    choose = random.Random(seed)
    path = choose.choice(PATHS)
    values = [None, True, -1, 10**25, 1e308, "a", "", [], {}, ["a", None], [[1], [2]], [101],
              {"a": [1]}, "\ud83d", "x" * 500]  # fmt: skip
    fields = ["input", "inputs", "model", "dimensions", "encoding_format", "truncate", "parameters",
              "normalize", "prompt_name", "\x00", "source_sentence"]  # fmt: skip
    body = dict(VALID.get(path, {"inputs": "a"}))
    for _ in range(choose.randint(0, 3)):
        body[choose.choice(fields)] = choose.choice(values)
    text = json.dumps(body, ensure_ascii=choose.random() < 0.5)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(choose.choice([0, 0, 1, 3])):
        if content:
            content[choose.randrange(len(content))] = choose.randrange(256)
    length = choose.choice([len(content)] * 20 + [len(content) + 5, -1, "x", 10**30])
    head = f"{choose.choice(['POST'] * 8 + ['GET', 'PATCH', 'CONNECT', 'PO ST'])} {path} HTTP/1.{choose.choice('1111109')}\r\n"
    head += choose.choice(["", "", "Host: x\r\n", "Host: \x01\r\n", "Authorization: Bearer \xff\r\n", "Expect: 100-continue\r\n",
        "Transfer-Encoding: chunked\r\n", "Content-Encoding: gzip\r\n", "Connection: close\r\n", "Upgrade: websocket\r\nConnection: Upgrade\r\n"])  # fmt: skip
    request = bytearray(f"{head}Content-Length: {length}\r\n\r\n".encode("latin-1")) + content
    if choose.random() < 0.1:
        request[choose.randrange(len(request))] = choose.randrange(256)
    return bytes(request)


def test_no_request_makes_the_server_fail(client, caplog, recwarn):
    """ONNXSIM_EMBED_FUZZ sets how many are sent."""
    statuses = []
    for seed in range(int(os.environ.get("ONNXSIM_EMBED_FUZZ", "150"))):
        statuses.append(client.raw(malformed(seed)))
    assert {status // 100 for status in set(statuses) - {None}} <= {2, 4}
    assert {200, 400, 404, 405, 422} <= set(statuses)
    assert statuses.count(None) < len(statuses) / 10
    assert [record for record in caplog.records if record.exc_info] == []
    assert client.embeddings("x")[0].shape == (1, 32)


# limits


def test_a_full_queue_is_an_answer_and_others_are_answered(model, client, calls):
    model.gate.clear()
    with ThreadPoolExecutor(3) as clients:
        waiting = [
            clients.submit(client.embeddings, [f"{n} {i}" for i in range(20)]) for n in range(2)
        ]
        wait_for(lambda: b"queue_texts 40.0" in client.send("GET", "/metrics")[1])
        response, content = client.send("POST", "/embed", {"inputs": ["a"] * 11})
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert "40 texts are waiting" in json.loads(content)["error"]
        waiting.append(clients.submit(client.embeddings, ["a"] * 10))
        wait_for(lambda: client.send("GET", "/ready")[0].status == 503)
        assert client.send("GET", "/health")[0].status == 200
        model.gate.set()
        assert [len(answer.result()[0]) for answer in waiting] == [20, 20, 10]
    assert client.send("GET", "/ready")[0].status == 200
    assert max(len(call) for call in calls if isinstance(call, list)) <= 10


def test_texts_of_clients_that_went_away_are_dropped(model, client, calls):
    model.gate.clear()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(client.embeddings, ["first"])
        wait_for(lambda: calls)
        body = json.dumps({"inputs": ["gone"]}).encode()
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(
                b"POST /embed HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            wait_for(lambda: b"queue_texts 2.0" in client.send("GET", "/metrics")[1])
        wait_for(lambda: b"queue_texts 1.0" in client.send("GET", "/metrics")[1])
        model.gate.set()
        first.result()
    client.embeddings(["last"])
    assert calls == ["first", "last"]


def test_slow_bodies_and_slow_answers_time_out(model, calls):
    with serving(model, limits=Limits(seconds=1)) as client, ThreadPoolExecutor(1) as clients:
        model.gate.clear()
        slow = clients.submit(client.send, "POST", "/embed", {"inputs": "a"})
        head = b"POST /embed HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", client.port), timeout=PATIENCE) as connection:
            connection.sendall(head)
            assert connection.recv(99).startswith(b"HTTP/1.1 408 ")
        assert slow.result()[0].status == 503
        model.gate.set()
        assert client.post("/embed", {"inputs": "a"})


def test_the_key_is_required(model):
    with serving(model, api_key="s3cret") as client:
        for key in ({}, {"Authorization": "Bearer no"}, {"Authorization": "s3cret"}):
            answer = client.post("/v1/embeddings", {}, 401, **key)
            assert answer["error"]["type"] == "authentication_error"
            assert client.send("GET", "/v1/models", headers=key)[0].status == 401
        answer = client.post("/embed", {"inputs": "x"}, Authorization="Bearer s3cret")
        np.testing.assert_array_equal(np.array(answer, np.float32), model.encode(["x"]))
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert client.send("GET", path)[0].status == 200


def test_limits_are_positive():
    with pytest.raises(ValueError, match="queue"):
        Limits(queue=0)


# what it says about itself


def test_pages(model, client):
    client.post("/embed", {"inputs": [LONG, "x"]})
    metrics = client.send("GET", "/metrics")[1].decode()
    lines = (line.split(" ") for line in metrics.splitlines() if line[0] != "#")
    values = {name: float(value) for name, value in lines}
    assert values['onnxsim_embed_requests_total{path="/embed",status="200"}'] > 0
    assert values['onnxsim_embed_request_seconds_count{path="/embed"}'] > 0
    assert values["onnxsim_embed_truncated_texts_total"] > 0
    assert values["onnxsim_embed_tokens_total"] > values["onnxsim_embed_texts_total"]
    assert values["onnxsim_embed_queue_texts"] == 0
    (served,) = json.loads(client.send("GET", "/v1/models")[1])["data"]
    assert served["id"] == "tiny"
    document = json.loads(client.send("GET", "/openapi.json")[1])
    content = document["paths"]["/embed"]["post"]["requestBody"]["content"]
    reference = content["application/json"]["schema"]["$ref"]
    known = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    assert {"inputs", "normalize", "truncate", "dimensions"} <= set(known)
    page = client.send("GET", "/docs")[1].decode()
    assert all(path in page for path in document["paths"])
    assert "http" not in page.lower()  # nothing is loaded from elsewhere


# the command


def test_sigterm_under_load_loses_no_accepted_request(artifact, tmp_path):
    (tmp_path / "key").write_text("s3cret\n", encoding="utf-8")
    # Without scipy: the image of examples/serve/Dockerfile has none.
    code = "import sys; sys.modules['scipy'] = None; from onnxsim_embed.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "-m", artifact, "--port", "0"]
    command += ["--api-key-file", tmp_path / "key", "--precision", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert "tiny (fp32, 32 dimensions" in line, process.stderr.read()
        client = Client(int(line.partition("127.0.0.1:")[2].partition(";")[0]))
        answered, unanswered = [], []

        def load(number):
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=PATIENCE)
            body = json.dumps({"inputs": [f"{number} {TEXTS[8]}"] * 20})
            while True:
                try:
                    connection.request("POST", "/embed", body, {"Authorization": "Bearer s3cret"})
                    response = connection.getresponse()
                    assert len(json.loads(response.read())) == 20
                    answered.append(response.status)
                except (ConnectionError, http.client.HTTPException) as error:
                    unanswered.append(error)
                    break
            connection.close()

        with ThreadPoolExecutor(8) as clients:
            loads = [clients.submit(load, number) for number in range(8)]
            wait_for(lambda: len(answered) > 30)
            process.send_signal(signal.SIGTERM)
            for done in loads:
                done.result()
        assert process.wait(PATIENCE) == -signal.SIGTERM
        # A connection that the server closed before it read a request ends without any answer.
        count = len(answered)
        assert process.stderr.read() == f"answered {count} of {count} accepted requests\n"
        assert {type(error) for error in unanswered} <= {
            http.client.RemoteDisconnected, ConnectionResetError, ConnectionRefusedError, BrokenPipeError
        }  # fmt: skip
        assert set(answered) == {200}
    finally:
        process.kill()
        process.communicate()


def test_wrong_calls_are_named(reject, artifact, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("two words", encoding="utf-8")
    assert "key" in reject("serve", "-m", artifact, "--api-key-file", tmp_path / "key")
    assert "size" in reject("serve", "-m", artifact, "--max-body", "much")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in reject("serve", "-m", artifact, "--port", port, code=1)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("onnxsim_embed.serve")]:
        monkeypatch.delitem(sys.modules, name)
    assert "[serve]" in reject("serve", "-m", artifact, code=1)
