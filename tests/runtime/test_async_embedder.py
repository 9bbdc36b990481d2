"""AsyncEmbedder: the embeddings of Embedder for concurrent callers, without blocking the loop."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from support import TEXTS

from onnxsim_embed import Embedder
from onnxsim_embed.runtime.async_embedder import AsyncEmbedder

SURROGATE = "rural \ud800 road"
PATIENCE = 30  # seconds after which a test has failed


def with_prompts(model):
    model.prompts["passage"] = "read: "
    return model


class Watched(Embedder):
    """An Embedder that records the texts of each call; a closed gate delays its answers."""

    def __init__(self, artifact):
        super().__init__(artifact, precision="fp32", threads=2)
        with_prompts(self)
        self.calls = []
        self.threads_seen = set()
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, inputs, *args, **kwargs):
        self.calls.append([inputs] if isinstance(inputs, str) else list(inputs))
        self.threads_seen.add(threading.current_thread())
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        return super().encode(inputs, *args, **kwargs)

    async def until_entered(self):
        """Wait until a call has begun, without blocking the loop."""
        assert await asyncio.to_thread(self.entered.wait, PATIENCE)
        self.entered.clear()


@pytest.fixture(scope="module")
def alone(artifact):
    """The same model without other callers: the expected results."""
    return with_prompts(Embedder(artifact, precision="fp32", threads=2))


@pytest.fixture
def watched(artifact):
    model = Watched(artifact)
    yield model
    model.gate.set()  # a failed test leaves no thread behind


def run(main):
    """Run a coroutine in an event loop of its own."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


def serve(embedder, *calls, method="encode", **options):
    """Call concurrently, each call a tuple of arguments and a dict; return results and errors."""

    async def main():
        async with AsyncEmbedder(embedder, **options) as model:
            started = (getattr(model, method)(*args, **kwargs) for args, kwargs in calls)
            return await asyncio.gather(*started, return_exceptions=True)

    return run(main())


def assert_same(result, expected):
    assert isinstance(result, np.ndarray), result
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected, strict=True)


async def passes(count=20):
    """Let the loop iterate, and timers of 0 seconds fire."""
    for _ in range(count):
        await asyncio.sleep(0)


# the same vectors


@pytest.mark.parametrize(("max_wait", "max_texts"), [(0, 5), (0.002, 64)])
def test_fifty_callers_get_their_embeddings_in_few_calls(watched, alone, max_wait, max_texts):
    inputs = [TEXTS[i % len(TEXTS)] + f" {i}" * (i % 7) for i in range(50)]
    calls = [((text,), {}) for text in inputs]
    results = serve(watched, *calls, max_wait=max_wait, max_texts=max_texts)
    for text, result in zip(inputs, results, strict=True):
        assert_same(result, alone.encode(text))
    together = min(max_texts, 50)
    assert list(map(len, watched.calls)) == [together] * (50 // together)


FORMATS = [
    {},
    {"precision": "ubinary", "truncate_dim": 16},
    {"precision": "int8"},
    {"precision": "uint8", "ranges": [[-0.5] * 4, [0.5] * 4], "truncate_dim": 4},
    {"truncate_dim": 7, "normalize_embeddings": True},
    {"prompt": "solar "},
    {"prompt_name": "query"},
    {"prompt_name": "passage"},
    {"prompt_name": "query", "prompt": "", "precision": "int8"},
]


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
def test_prompts_and_dtypes_share_a_call(watched, alone, method, monkeypatch):
    for model in (watched, alone):
        monkeypatch.setattr(model, "default_prompt_name", "passage")
    calls = [((TEXTS[i : i + 5],), options) for i, options in enumerate(FORMATS)]
    calls += [(([],), options) for options in FORMATS]
    results = serve(watched, *calls, method=method, max_texts=1000)
    assert len(watched.calls) == 1
    for (args, options), result in zip(calls, results, strict=True):
        assert_same(result, getattr(alone, method)(*args, **options))


def test_one_text_is_one_row_and_a_list_of_one_is_a_matrix(alone):
    text, row, texts, words = serve(
        alone,
        (("the sun",), {}),
        ((["the sun"],), {}),
        ((iter(TEXTS),), {}),
        (({"the sky": 1, "the sun": 2}.keys(),), {}),
    )
    assert text.shape == (32,)
    assert_same(row, text[None])
    assert_same(texts, alone.encode(TEXTS))
    assert_same(words, alone.encode(["the sky", "the sun"]))


def test_a_result_is_its_callers_own(alone):
    calls = [((text,), {}) for text in ("the sun", "the sky", "the sun")]
    sun, _, again = serve(alone, *calls)
    sun[:] = 0
    assert_same(again, alone.encode("the sun"))
    assert again.base is None or again.base.size == 32  # keeps nothing of the others


def test_texts_are_those_at_the_time_of_the_call(watched, alone):
    async def main():
        async with AsyncEmbedder(watched, max_wait=0.01) as model:
            texts = ["the sun", "the sky"]
            call = asyncio.create_task(model.encode(texts))
            await asyncio.sleep(0)
            texts[:] = [1]
            return await call

    assert_same(run(main()), alone.encode(["the sun", "the sky"]))


# the event loop is not blocked


def test_the_loop_runs_and_requests_gather_while_the_model_runs(watched, alone):
    async def main():
        async with AsyncEmbedder(watched, max_wait=0) as model:
            watched.gate.clear()
            calls = [asyncio.create_task(model.encode("first"))]
            await watched.until_entered()
            for number in range(10):
                calls.append(asyncio.create_task(model.encode(str(number))))
                await passes()
            assert not any(call.done() for call in calls)
            watched.gate.set()
            return await asyncio.gather(*calls)

    assert_same(run(main())[0], alone.encode("first"))
    assert watched.calls == [["first"], [str(number) for number in range(10)]]
    assert threading.current_thread() not in watched.threads_seen
    assert len(watched.threads_seen) == 1


def test_a_large_request_is_not_split_and_others_follow_in_their_order(watched, alone):
    large = [f"project {number} in the village" for number in range(5000)]

    async def main():
        async with AsyncEmbedder(watched, max_wait=1000, max_texts=3) as model:
            before = asyncio.create_task(model.encode(["a", "b"]))
            calls = [asyncio.create_task(model.encode(large))]
            calls += [asyncio.create_task(model.encode(text)) for text in "cdef"]
            return await asyncio.gather(before, *calls)

    results = run(main())
    assert watched.calls == [["a", "b"], large, ["c", "d", "e"], ["f"]]
    assert_same(results[1], alone.encode(large))
    assert_same(results[5], alone.encode("f"))


# errors stay with their callers


BAD = [
    ((["the sun", 7],), {}, TypeError, r"text 1 is int \(7\)"),
    ((None,), {}, TypeError, "got NoneType"),
    (("the sun",), {"prompt_name": "poem"}, ValueError, "'poem' is not among"),
    (("the sun",), {"precision": "int8"}, ValueError, "int8 needs ranges"),
    (([],), {"truncate_dim": 33}, ValueError, "from 1 to 32, got 33"),
    (("the sun",), {"precision": "uint8", "ranges": [[0], [1]]}, ValueError, r"\(2, 32\)"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD)
def test_invalid_arguments_do_not_reach_other_callers(watched, alone, args, options, kind, message):
    good, bad, other = serve(watched, (("a",), {}), (args, options), (("b",), {}))
    assert watched.calls == [["a", "b"]]
    assert_same(good, alone.encode("a"))
    assert_same(other, alone.encode("b"))
    with pytest.raises(kind, match=message):
        raise bad
    if args[0] is not None:  # `Embedder.encode` has a former name for its inputs
        with pytest.raises(kind, match=message):
            alone.encode(*args, **options)


def test_an_error_of_a_shared_call_reaches_only_its_caller(watched, alone):
    inputs = [["the sun", "the sky"], ["a", "b", SURROGATE], "the road", SURROGATE]
    results = serve(watched, *[((texts,), {}) for texts in inputs])
    assert_same(results[0], alone.encode(inputs[0]))
    assert_same(results[2], alone.encode(inputs[2]))
    for failed, row in ((1, 2), (3, 0)):
        with pytest.raises(ValueError, match=f"text {row} is not valid Unicode") as theirs:
            raise results[failed]
        with pytest.raises(ValueError, match="not valid Unicode") as ours:
            alone.encode(inputs[failed])
        assert str(theirs.value) == str(ours.value)
    assert list(map(len, watched.calls)) == [7, 2, 3, 1, 1]


@pytest.mark.parametrize(
    "options", [{"max_wait": -1}, {"max_wait": float("nan")}, {"max_texts": 0}]
)
def test_invalid_limits_are_named(alone, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AsyncEmbedder(alone, **options)


def test_an_unknown_argument_is_named(alone):
    with pytest.raises(TypeError, match="batch_size"):
        run(AsyncEmbedder(alone).encode_query("a", batch_size=3))


def test_it_says_what_to_pickle_instead(alone):
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="`embedder`"):
            copied(AsyncEmbedder(alone))


# cancelled callers


def test_a_caller_cancelled_while_waiting_is_skipped(watched, alone):
    async def main():
        async with AsyncEmbedder(watched, max_wait=1000, max_texts=3) as model:
            calls = [asyncio.create_task(model.encode(text)) for text in ("a", "b")]
            await passes(2)
            calls[0].cancel()
            await passes(2)
            calls.append(asyncio.create_task(model.encode("c")))
            calls.append(asyncio.create_task(model.encode("d")))  # the third that counts
            return await asyncio.gather(*calls, return_exceptions=True)

    cancelled, *others = run(main())
    assert watched.calls == [["b", "c", "d"]]
    assert isinstance(cancelled, asyncio.CancelledError)
    for text, result in zip("bcd", others, strict=True):
        assert_same(result, alone.encode(text))


def test_a_caller_cancelled_while_the_model_runs_affects_no_other(watched, alone):
    async def main():
        async with AsyncEmbedder(watched, max_wait=0) as model:
            watched.gate.clear()
            calls = [asyncio.create_task(model.encode(text)) for text in ("a", SURROGATE, "c")]
            await watched.until_entered()
            calls[0].cancel()
            calls[1].cancel()
            await passes()
            assert calls[0].cancelled()
            assert calls[1].cancelled()
            watched.gate.set()
            return await calls[2], await model.encode("d")

    third, later = run(main())
    assert_same(third, alone.encode("c"))
    assert_same(later, alone.encode("d"))


def test_cancelling_the_task_of_a_batch_leaves_no_caller_waiting(watched, alone):
    async def main():
        async with AsyncEmbedder(watched, max_wait=0, max_texts=1) as model:
            watched.gate.clear()
            others = asyncio.all_tasks()
            calls = [asyncio.create_task(model.encode(text)) for text in "ab"]
            await watched.until_entered()
            (batch,) = asyncio.all_tasks() - others - set(calls)
            batch.cancel()
            await asyncio.wait(calls)
            assert all(call.cancelled() for call in calls)
            watched.gate.set()
            return await model.encode("c")

    assert_same(run(main()), alone.encode("c"))


# the end


def test_closing_answers_running_and_waiting_callers(watched, alone):
    async def main():
        model = AsyncEmbedder(watched, max_wait=0, max_texts=2)
        watched.gate.clear()
        calls = [asyncio.create_task(model.encode(text)) for text in "abcde"]
        await watched.until_entered()
        closings = [asyncio.create_task(model.aclose()) for _ in range(2)]
        await passes()
        assert not any(closing.done() for closing in closings)
        with pytest.raises(RuntimeError, match="closed"):
            await model.encode("f")
        watched.gate.set()
        await asyncio.gather(*closings)
        assert all(call.done() for call in calls)
        await model.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await model.encode([])
        return await asyncio.gather(*calls)

    for text, result in zip("abcde", run(main()), strict=True):
        assert_same(result, alone.encode(text))
    assert watched.calls == [["a", "b"], ["c", "d"], ["e"]]


def test_closing_neither_waits_for_others_nor_leaves_a_thread(watched):
    assert serve(watched) == []  # never used

    async def main():
        async with AsyncEmbedder(watched, max_wait=1000) as model:
            call = asyncio.create_task(model.encode("a"))
            await passes(2)
        await call

    run(main())
    (thread,) = watched.threads_seen
    thread.join(PATIENCE)
    assert not thread.is_alive()


# event loops


def test_a_second_open_loop_is_an_error(watched, alone):
    async def main():
        async with AsyncEmbedder(watched) as model:
            await model.encode("a")
            with ThreadPoolExecutor(1) as other:
                loop = asyncio.get_running_loop()
                with pytest.raises(RuntimeError, match="belongs to another event loop"):
                    await loop.run_in_executor(other, lambda: asyncio.run(model.encode("b")))
            return await model.encode("c")

    assert_same(run(main()), alone.encode("c"))
    assert watched.calls == [["a"], ["c"]]


def test_a_loop_that_ends_during_a_call_leaves_nothing_behind(watched, alone, caplog):
    model = AsyncEmbedder(watched, max_wait=0, max_texts=1)

    async def main():
        watched.gate.clear()
        calls = [asyncio.create_task(model.encode(text)) for text in "abc"]
        await watched.until_entered()
        return calls  # asyncio.run cancels them

    assert all(call.cancelled() for call in run(main()))
    watched.gate.set()
    assert_same(run(model.encode("d")), alone.encode("d"))
    run(model.aclose())
    with pytest.raises(RuntimeError, match="closed"):
        run(model.encode("e"))
    assert watched.calls == [["a"], ["d"]]
    for thread in watched.threads_seen:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert caplog.records == []


def test_a_loop_closed_with_open_tasks_does_not_block_the_next(watched, alone):
    model = AsyncEmbedder(watched, max_wait=0, max_texts=1)
    loop = asyncio.new_event_loop()
    watched.gate.clear()
    calls = [loop.create_task(model.encode(text)) for text in "ab"]
    loop.run_until_complete(watched.until_entered())
    loop.close()
    watched.gate.set()
    assert_same(run(model.encode("c")), alone.encode("c"))
    assert not any(call.done() for call in calls)


# a web service


def test_the_example_of_the_docstring(alone, monkeypatch):
    """Runs it with a stand-in for the FastAPI it imports: routes, a lifespan, a request's `app`."""

    class FastAPI:
        def __init__(self, lifespan):
            self.lifespan, self.routes, self.state = lifespan, {}, SimpleNamespace()

        def post(self, path):
            return lambda handler: self.routes.setdefault(path, handler)

    module = ModuleType("fastapi")
    module.FastAPI, module.Request = FastAPI, SimpleNamespace
    monkeypatch.setitem(sys.modules, "fastapi", module)
    monkeypatch.setattr(Embedder, "from_pretrained", lambda name: alone)
    example = inspect.getdoc(AsyncEmbedder).partition("::\n\n")[2]
    names = {}
    exec(textwrap.dedent(example), names)

    async def main():
        app = names["app"]
        async with app.lifespan(app):
            handler, request = app.routes["/embed"], module.Request(app=app)
            return await asyncio.gather(*(handler(request, TEXTS[i:]) for i in range(5)))

    for start, answer in enumerate(run(main())):
        assert answer == alone.encode(TEXTS[start:]).tolist()
