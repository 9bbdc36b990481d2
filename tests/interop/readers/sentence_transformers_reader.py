"""sentence-transformers: an artifact by its ONNX files, or a checkpoint by PyTorch."""

from job import finish, job
from sentence_transformers import SentenceTransformer

files = {"file_name": job["file"], "provider": "CPUExecutionProvider"}
model = SentenceTransformer(
    job["directory"],
    backend=job["backend"],
    device="cpu",
    model_kwargs=files if job["backend"] == "onnx" else None,
)
vectors = model.encode(job["texts"], prompt_name=job["prompt_name"], batch_size=7)
finish(vectors, max_seq_length=model.max_seq_length, modules=[type(m).__name__ for m in model])
