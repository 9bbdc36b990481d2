"""fastembed: an artifact as a custom model at a path."""

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from job import finish, job

TextEmbedding.add_custom_model(
    model="the-artifact",
    pooling={"mean": PoolingType.MEAN, "cls": PoolingType.CLS}[job["pooling"]],
    normalization=True,
    sources=ModelSource(hf="none/none"),  # it must name one, and does not go there
    dim=job["dim"],
    model_file=job["file"],
)
model = TextEmbedding("the-artifact", specific_model_path=job["directory"])
vectors = list(model.embed(job["texts"], batch_size=7))
finish(vectors, max_seq_length=model.model.tokenizer.truncation["max_length"])
