"""All pairs above a threshold, and the k best of each row, by ours and by others; see `worker`.

Settings: `vectors` (an .npy file of float32 unit rows) and `threads`. A request has `task` ("above" with
`threshold`, or "best" with `k`), `rows` (so many from the first on) and perhaps `save`, a file for the
result. The clock runs from the array of vectors to the system's own result: a sparse matrix, or scores
and indices. A row is among its own best, in every system.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

Settings = dict[str, Any]
Task = Callable[[Any, dict[str, Any]], Any]
Parts = Callable[[Any], dict[str, Any]]


def load(name: str, settings: Settings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load a system, and the vectors.

    :param name: ours, ours-float32, notebook, st-util, faiss, sklearn or sparse-dot-topn.
    """
    numpy = import_module("numpy")
    tasks, parts = SYSTEMS[name](settings)
    vectors = numpy.load(settings["vectors"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        task = tasks[request["task"]]
        rows = numpy.ascontiguousarray(vectors[: request["rows"]])
        started = time.perf_counter()
        result = task(rows, request)
        seconds = time.perf_counter() - started

        def finish() -> dict[str, Any]:
            arrays = parts(result)
            if request.get("save"):
                numpy.savez(request["save"], **arrays)
            return {"entries": len(arrays["scores"]), "output_mb": size_mb(result, arrays)}

        return {"seconds": seconds, "finish": finish}

    return answer


def size_mb(result: Any, arrays: dict[str, Any]) -> float:  # noqa: ANN401
    """Return the size of a result: its own arrays where it has some, else those it says as much in."""
    names = ("data", "indices", "indptr") if hasattr(result, "indptr") else ("data", "row", "col")
    if hasattr(result, "data"):
        return float(sum(getattr(result, name).nbytes for name in names) / 1e6)
    held = [part for part in result if hasattr(part, "nbytes")] or list(arrays.values())
    return float(sum(array.nbytes for array in held) / 1e6)


def parts_of(found: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return rows, columns and scores of a sparse matrix, or of scores and indices (n, k)."""
    if not isinstance(found, tuple):
        entries = found.tocoo()
        return {"rows": entries.row, "columns": entries.col, "scores": entries.data}
    numpy, (scores, indices) = import_module("numpy"), found
    rows = numpy.repeat(numpy.arange(len(indices), dtype=numpy.int32), indices.shape[1])
    return {"rows": rows, "columns": indices.ravel(), "scores": scores.ravel()}


def ours(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return onnxsim-embed as it comes: rough scores in int8 or float32, whichever is faster."""
    similarity = import_module("onnxsim_embed.similarity.compare")
    tasks: dict[str, Task] = {
        "above": lambda rows, asked: similarity.similarity_matrix(rows, asked["threshold"]),
        "best": lambda rows, asked: similarity.top_k(rows, rows, asked["k"]),
    }
    return tasks, parts_of


def ours_float32(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return onnxsim-embed on a processor whose int8 products do not serve."""
    blocks = import_module("onnxsim_embed.similarity.candidates")
    if not hasattr(blocks, "int8_scoring_supported"):
        raise AttributeError(
            "onnxsim_embed.similarity.candidates no longer asks int8_scoring_supported: adapt the bench"
        )
    vars(blocks)["int8_scoring_supported"] = lambda width: False
    return ours(settings)


def notebook(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return the way of notebooks: a dense matrix of cosines, masked, made sparse."""
    torch, sparse = import_module("torch"), import_module("scipy.sparse")
    torch.set_num_threads(settings["threads"])

    def above(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        unit = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
        scores = (unit @ unit.T).numpy()
        return sparse.coo_matrix(scores * (scores > asked["threshold"]))

    return {"above": above}, parts_of


def st_util(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return sentence-transformers' `util.semantic_search`."""
    numpy, torch = import_module("numpy"), import_module("torch")
    util = import_module("sentence_transformers.util")
    torch.set_num_threads(settings["threads"])

    def best(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        # For unit vectors, its documentation says to take dot_score.
        unit = torch.from_numpy(rows)
        return util.semantic_search(unit, unit, top_k=asked["k"], score_function=util.dot_score)

    def parts(found: list[list[dict[str, Any]]]) -> dict[str, Any]:
        scores = numpy.array([[hit["score"] for hit in row] for row in found], numpy.float32)
        indices = numpy.array([[hit["corpus_id"] for hit in row] for row in found])
        return parts_of((scores, indices))

    return {"best": best}, parts


def faiss(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return faiss's exact index: inner products of unit vectors."""
    library, sparse = import_module("faiss"), import_module("scipy.sparse")
    library.omp_set_num_threads(settings["threads"])

    def indexed(rows: Any) -> Any:  # noqa: ANN401
        index = library.IndexFlatIP(rows.shape[1])
        index.add(rows)
        return index

    def above(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        limits, scores, columns = indexed(rows).range_search(rows, asked["threshold"])
        return sparse.csr_array((scores, columns, limits.astype("int64")), shape=(len(rows),) * 2)

    def best(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        return indexed(rows).search(rows, asked["k"])

    return {"above": above, "best": best}, parts_of


def sklearn(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return scikit-learn's brute force, by the euclidean distance that its fast path knows."""
    neighbors = import_module("sklearn.neighbors")

    def above(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        radius = (2 - 2 * asked["threshold"]) ** 0.5
        graph = neighbors.radius_neighbors_graph(rows, radius, mode="distance", include_self=True)
        graph.data = 1 - graph.data**2 / 2
        return graph

    def best(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        index = neighbors.NearestNeighbors(n_neighbors=asked["k"], algorithm="brute").fit(rows)
        distances, columns = index.kneighbors(rows)
        return 1 - distances**2 / 2, columns

    return {"above": above, "best": best}, parts_of


def sparse_dot_topn(settings: Settings) -> tuple[dict[str, Task], Parts]:
    """Return sparse_dot_topn on vectors written as a sparse matrix without zeros."""
    library, sparse = import_module("sparse_dot_topn"), import_module("scipy.sparse")

    def above(rows: Any, asked: dict[str, Any], most: int = 0) -> Any:  # noqa: ANN401
        matrix = sparse.csr_matrix(rows)
        return library.sp_matmul_topn(
            matrix, matrix.T.tocsr(), top_n=most or len(rows), n_threads=settings["threads"],
            threshold=None if most else asked["threshold"],
        )  # fmt: skip

    def best(rows: Any, asked: dict[str, Any]) -> Any:  # noqa: ANN401
        return above(rows, asked, asked["k"])

    return {"above": above, "best": best}, parts_of


SYSTEMS: dict[str, Callable[[Settings], tuple[dict[str, Task], Parts]]] = {
    "ours": ours,
    "ours-float32": ours_float32,
    "notebook": notebook,
    "st-util": st_util,
    "faiss": faiss,
    "sklearn": sklearn,
    "sparse-dot-topn": sparse_dot_topn,
}
