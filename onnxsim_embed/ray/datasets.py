"""Vectors for the rows of any Ray dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.ray.connection import cpus_of, nodes, plan_actors, replace_actors, require_ray
from onnxsim_embed.ray.encoder import EncodeOptions, PackedModel, TextEncoder

if TYPE_CHECKING:
    from ray.data import Dataset

    from onnxsim_embed.runtime.embedder import Embedder

# Rows that an actor takes at a time: enough to fill its threads, few enough to be done again.
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
    on_error: str = "skip",
    batch_size: int = BATCH_ROWS,
    actor_threads: int | None = None,
    actors: int | None = None,
) -> Dataset:
    """Add the vectors of a column of texts to a dataset; lazy, as Ray Data's own operations are.

    Each actor holds one model, whose files travel through the object store once for each node. It reserves so
    little of the processors that its threads use that each node has a whole one left: Ray Data's readers and
    writers reserve one each, and wait for ever where there is none.

    :param ds: the dataset; its other columns are kept.
    :param model: recipe name, artifact, checkpoint, Hub id, or a model that is loaded.
    :param column: the column of texts.
    :param output_column: of the vectors, float32 lists of the model's width; null where there is none.
    :param error_column: of strings, why a row has no vector; null where it has one.
    :param on_error: "skip" gives a row without a usable text (null, no string, invalid Unicode) a null vector;
        "raise" stops.
    :param batch_size: rows that an actor takes at a time.
    :param actor_threads: threads of each actor; None for the most, up to 4, that leave the fewest
        processors idle.
    :param actors: how many; None for as many as the cluster has room for. The rest: see `Embedder.encode`.
    :raises ValueError: for an unknown precision, prompt, length or width.
    :raises CheckpointError: if the model cannot be found.

    Usage::

        ds = ray.data.read_parquet("s3://bucket/texts/")
        encode_dataset(ds, "all-MiniLM-L6-v2", column="text").write_parquet("s3://bucket/vectors/")
    """
    require_ray()
    import ray

    if not ray.is_initialized():
        ray.init()  # as Ray Data itself does
    embedder = load_model(model, precision)
    options = EncodeOptions(
        embedder.prompt_text(prompt_name, prompt),
        max_seq_length,
        normalize_embeddings,
        truncate_dim,
        on_error,
    )
    options.apply(embedder)
    # As many processors are left as Ray Data's own readers and writers need: whole ones.
    plan = plan_actors(cpus_of(nodes()), actor_threads, actors, spare=1)
    replace_actors(ds.context)
    return ds.map_batches(
        DatasetEncoder,
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=plan.cpus,
        compute=pool(plan.count),
        fn_constructor_kwargs={
            "model": ray.put(PackedModel.of(embedder.artifact, embedder.precision)),
            "options": options,
            "threads": plan.threads,
            "columns": (column, output_column, error_column),
        },
    )


def load_model(model: str | Embedder, precision: str) -> Embedder:
    """Load a model for a look at it, or return the one that is loaded."""
    from onnxsim_embed.runtime.embedder import Embedder

    if isinstance(model, Embedder):
        return Embedder(
            Artifact.open(model.artifact.directory),
            precision=model.precision,
            device="cpu",
            threads=1,
        )
    return Embedder.from_pretrained(model, precision=precision, device="cpu", threads=1)


def pool(count: int) -> Any:  # noqa: ANN401 - Ray is untyped here
    """Return a pool of so many actors that goes on with fewer where nodes are lost."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(min_size=1, max_size=count, initial_size=count)


class DatasetEncoder:
    """Adds vectors to batches of a dataset; one actor of `encode_dataset`.

    :param columns: of texts, of vectors, and of errors.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a reference
        options: EncodeOptions,
        threads: int,
        columns: tuple[str, str, str],
    ) -> None:
        self._encoder = TextEncoder(model, options, threads)
        self._columns = columns

    def __call__(self, batch: Any) -> Any:  # noqa: ANN401 - pyarrow is untyped
        """Return a pyarrow table with two more columns."""
        import numpy as np
        import pyarrow

        text, vector, error = self._columns
        if text not in batch.column_names:
            raise ValueError(
                f"the dataset has no column {text!r}; it has: {', '.join(batch.column_names)}"
            )
        values = batch.column(text).to_pylist()
        places, vectors, remarks = self._encoder.encode(range(len(values)), values)
        whole = np.zeros((len(values), vectors.shape[1]), np.float32)
        whole[places] = vectors
        missing = np.ones(len(values), bool)
        missing[places] = False
        reasons: list[str | None] = [None] * len(values)
        for remark in remarks:
            if not remark.encoded:
                reasons[int(remark.id)] = remark.reason
        column = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(whole.ravel()), whole.shape[1], mask=pyarrow.array(missing)
        )
        for name in (vector, error):
            if name in batch.column_names:
                batch = batch.drop_columns([name])
        return batch.append_column(vector, column).append_column(
            error, pyarrow.array(reasons, pyarrow.string())
        )
