"""Vectors for the rows of any Ray dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxsim_embed.files.texts import text_problem
from onnxsim_embed.ray.connection import check_nodes, cluster_cpus, plan_actors, require_ray
from onnxsim_embed.ray.encoder import PackedModel, TextEncoder, prepare_model
from onnxsim_embed.ray.tasks import actor_pool

if TYPE_CHECKING:
    from ray.data import Dataset

    from onnxsim_embed.runtime.embedder import Embedder
    from onnxsim_embed.runtime.options import LongTexts

# Rows that an actor takes at a time: enough to fill its threads, few enough to repeat.
BATCH_ROWS = 1024


def encode_dataset(
    ds: Dataset,
    model: str | Embedder = "all-MiniLM-L6-v2",
    column: str = "text",
    *,
    output_column: str = "vector",
    error_column: str = "vector_error",
    precision: str = "auto",
    prompt_name: str | None = None,
    prompt: str | None = None,
    max_seq_length: int | None = None,
    normalize_embeddings: bool | None = None,
    truncate_dim: int | None = None,
    long_texts: LongTexts = "truncate",
    stride: int = 0,
    on_error: str = "skip",
    batch_size: int = BATCH_ROWS,
    actor_threads: int | None = None,
    actors: int | None = None,
) -> Dataset:
    """Add the vectors of a text column to a dataset; lazy, as the operations of Ray Data are.

    Each actor holds one model, whose files travel through the object store once for each node. On every node
    actors leave one processor unreserved: Ray Data's readers and writers reserve a whole one each, and wait
    forever if there is none.

    :param ds: the dataset; its other columns are kept.
    :param model: recipe name, artifact, checkpoint, Hub id, or a loaded model.
    :param column: column of the texts.
    :param output_column: column of the vectors, float32 lists of the model's dimension; null without one.
    :param error_column: column of strings: why a row has no vector, or null.
    :param precision: "auto" requires that all processors choose the same, and raises naming a node.
    :param on_error: "skip" gives a row without a text (null, not a string, invalid Unicode) a null vector,
        "blank" that of an empty text; "fail" stops.
    :param batch_size: rows that an actor takes at a time.
    :param actor_threads: threads of each actor; None for the number up to 4 that leaves the fewest
        processors idle.
    :param actors: number of actors; None for all that fit. For the other arguments see `Embedder.encode`.
    :raises ValueError: for an unknown precision or prompt, an invalid length or dimension.
    :raises CheckpointError: if the model cannot be found.

    Usage::

        ds = ray.data.read_parquet("s3://bucket/texts/")
        encode_dataset(ds, "all-MiniLM-L6-v2", column="text").write_parquet("s3://bucket/vectors/")
    """
    require_ray()
    import ray

    if not ray.is_initialized():
        ray.init()  # as Ray Data itself does
    embedder, options = prepare_model(
        model, precision, max_seq_length, on_error, prompt_name=prompt_name, prompt=prompt,
        normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim,
        long_texts=long_texts, stride=stride,
    )  # fmt: skip
    check_nodes(options)
    plan = plan_actors(cluster_cpus(), actor_threads, actors, spare=1)
    return ds.map_batches(
        DatasetEncoder,
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=plan.cpus,
        compute=actor_pool(ds.context, plan.count),
        fn_constructor_kwargs={
            "model": ray.put(PackedModel.of(embedder)),
            "options": options,
            "threads": plan.threads,
            "columns": (column, output_column, error_column),
        },
    )


class DatasetEncoder:
    """Adds vectors to batches of a dataset; an actor of `encode_dataset`.

    :param columns: of texts, of vectors, and of errors.
    :param encoder: arguments of `TextEncoder`.
    """

    def __init__(self, columns: tuple[str, str, str], **encoder: Any) -> None:  # noqa: ANN401
        self._encoder = TextEncoder(**encoder)
        self._columns = columns

    def __call__(self, batch: Any) -> Any:  # noqa: ANN401 - pyarrow is untyped
        """Return a pyarrow table with two more columns."""
        import pyarrow

        text_column, vector_column, error_column = self._columns
        if text_column not in batch.column_names:
            raise ValueError(
                f"the dataset has no column {text_column!r}; it has: {', '.join(batch.column_names)}"
            )
        values = dict(enumerate(batch.column(text_column).to_pylist()))
        problems = {row: reason for row in values if (reason := text_problem(values[row]))}
        texts = ["" if row in problems else value for row, value in values.items()]
        encoded, vectors, diagnostics = self._encoder.encode(range(len(values)), texts, problems)
        rows = dict(zip(encoded, vectors, strict=True))
        reasons = {entry.id: entry.reason for entry in diagnostics if not entry.encoded}
        kind = pyarrow.list_(pyarrow.float32(), vectors.shape[1])
        lists = pyarrow.array([rows.get(row) for row in values], kind)
        existing = [name for name in (vector_column, error_column) if name in batch.column_names]
        batch = batch.drop_columns(existing) if existing else batch
        batch = batch.append_column(vector_column, lists)
        errors = pyarrow.array([reasons.get(row) for row in values], pyarrow.string())
        return batch.append_column(error_column, errors)
