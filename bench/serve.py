"""A server beside what it is made of: latency of one client, texts a second of 64, memory over 100,000 requests.

    python bench/serve.py [--model all-MiniLM-L6-v2] [--requests 2000] [--soak 100000] [--peer-path DIRECTORY]

Systems, each a process that holds the model, with the same short texts, one text a request: `onnxsim-embed serve`
(OpenAI's API, base64, as its client asks by default), AsyncEmbedder in a process with its callers (what HTTP and JSON
cost), and a plain FastAPI application on sentence-transformers. Clients are one process that keeps connections open; it
shares the processors with the server. Systems take turns, round by round; figures are medians of rounds. --peer-path is
a directory with FastAPI where it is not installed. Writes bench/results/serve.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import numpy as np
import psutil
from lab.conditions import machine, today
from lab.turns import parser, save

ROOT = Path(__file__).parent.parent
CLIENTS = 64
WORDS = ["rural", "road", "water", "school", "clinic", "market", "village", "solar", "training", "women"]  # fmt: skip
Call = Callable[[str], Awaitable[object]]

PEER = """
import sys
import uvicorn
from fastapi import FastAPI
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
app = FastAPI()

@app.post("/embed")
def embed(texts: list[str]) -> list[list[float]]:
    return model.encode(texts).tolist()

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


def short_texts(count: int) -> list[str]:
    """Return distinct texts of some ten words."""
    random = np.random.default_rng(0)
    return [f"{' '.join(random.choice(WORDS, 9))} {number}" for number in range(count)]


async def measure(call: Call, texts: list[str], clients: int) -> dict[str, float]:
    """Return texts a second and latencies in ms of concurrent clients, each with one text at a time."""
    waiting, seconds = iter(texts), []

    async def client() -> None:
        for text in waiting:
            started = time.perf_counter()
            await call(text)
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    rate = len(texts) / (time.perf_counter() - started)
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"texts_per_second": rate, "p50_ms": p50, "p99_ms": p99}


class Connections:
    """Connections to a server, kept open; a call takes a free one."""

    def __init__(self, port: int, path: str, body: Callable[[str], object]) -> None:
        self._port, self._path, self._body = port, path, body
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, text: str) -> bytes:
        """Send a request, return the body of its answer, which must have status 200."""
        content = json.dumps(self._body(text)).encode()
        opened = self._free.pop() if self._free else None
        reader, writer = opened or await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {self._path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer)
        if not answer.startswith(b"HTTP/1.1 200 ") or length is None:
            raise RuntimeError(f"{self._path} answered {answer!r}")
        body = await reader.readexactly(int(length[1]))
        self._free.append((reader, writer))
        return body

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._free:
            writer.close()


class Server:
    """A server in a process of its own, until the block ends."""

    def __init__(
        self, command: list[str], port: int, path: str, body: Callable[[str], object]
    ) -> None:
        self._command, self.port = command, port
        self._arguments = (port, path, body)

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self._command)
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"{self._command} ended")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def measure(self, texts: list[str], clients: int) -> dict[str, float]:
        """Measure clients that keep their connections open."""

        async def main() -> dict[str, float]:
            calls = Connections(*self._arguments)
            await measure(calls, texts[:clients], clients)  # warms up
            result = await measure(calls, texts, clients)
            calls.close()
            return result

        return asyncio.run(main())

    def resident_mb(self) -> float:
        """Return the resident memory of the process in 1e6 bytes."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


class InProcess:
    """AsyncEmbedder with its callers in this process."""

    def __init__(self, model: str) -> None:
        from onnxsim_embed import Embedder

        self._embedder = Embedder(model)

    def measure(self, texts: list[str], clients: int) -> dict[str, float]:
        """Measure concurrent callers."""
        from onnxsim_embed import AsyncEmbedder

        async def main() -> dict[str, float]:
            async with AsyncEmbedder(self._embedder, max_wait=0) as shared:
                await measure(shared.encode, texts[:clients], clients)
                return await measure(shared.encode, texts, clients)

        return asyncio.run(main())


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def our_server(model: str, name: str) -> Server:
    """Return `onnxsim-embed serve`."""
    port = free_port()
    command = [sys.executable, "-m", "onnxsim_embed", "serve", "-m", model, "--port", str(port)]

    def body(text: str) -> object:
        return {"input": text, "model": name, "encoding_format": "base64"}

    return Server([*command, "-q", "--served-model-name", name], port, "/v1/embeddings", body)


def soak(model: str, requests: int) -> list[dict[str, float]]:
    """Return resident memory and texts a second of a server over many requests, ten times."""
    rows = []
    texts = short_texts(requests // 10)
    with our_server(model, "m") as server:
        for number in range(11):
            row = {"requests": number * len(texts), "resident_mb": server.resident_mb()}
            if number < 10:
                row |= server.measure(texts, CLIENTS)
            rows.append(row)
            print(row, flush=True)
        with urlopen(f"http://127.0.0.1:{server.port}/metrics") as metrics:
            assert b'status="200"' in metrics.read()
    return rows


def main() -> None:
    """Measure, print and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="all-MiniLM-L6-v2")
    arguments.add_argument("--peer-model", help="for sentence-transformers; default: the recipe's")
    arguments.add_argument("--peer-path")
    arguments.add_argument("--requests", type=int, default=2000)
    arguments.add_argument("--soak", type=int, default=100_000)
    options = arguments.parse_args()
    from onnxsim_embed.artifact.recipes import find_recipe
    from onnxsim_embed.system.hardware import available_cpus

    peer_model = options.peer_model or str(find_recipe("minilm").installed_directory())
    port = free_port()
    environment = {"PYTHONPATH": options.peer_path} if options.peer_path else {}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.values()])
    texts = short_texts(options.requests)
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as work:
        script = Path(work) / "peer.py"
        script.write_text(PEER)
        peer = Server(
            [sys.executable, str(script), peer_model, str(port)], port, "/embed", lambda t: [t]
        )
        with our_server(options.model, "m") as ours, peer:
            systems = {"onnxsim-embed serve": ours, "AsyncEmbedder in process": InProcess(options.model),
                       "FastAPI, sentence-transformers": peer}  # fmt: skip
            for number in range(options.rounds):
                for name, system in list(systems.items())[:: -1 if number % 2 else 1]:
                    row = {"one": system.measure(texts[: options.requests // 4], 1),
                           "many": system.measure(texts, CLIENTS)}  # fmt: skip
                    rounds.setdefault(name, []).append(row)
                    print(name, json.dumps(row), flush=True)
    summary = {
        name: {
            case: {figure: median(row[case][figure] for row in rows) for figure in rows[0][case]}
            for case in rows[0]
        }
        for name, rows in rounds.items()
    }
    table = {
        "date": today(), "machine": machine(available_cpus()), "clients": CLIENTS,
        "requests": options.requests, "systems": summary, "rounds": rounds,
        "soak": soak(options.model, options.soak) if options.soak else None,
    }  # fmt: skip
    save("serve", table)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
