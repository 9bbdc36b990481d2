"""The exceptions of this package; wrong arguments raise ValueError and TypeError."""


class OnnxsimEmbedError(Exception):
    """Base of every error that is about the job rather than about an argument."""


class ArtifactError(OnnxsimEmbedError):
    """An artifact directory is missing, damaged, incomplete or of an unknown format."""


class CheckpointError(OnnxsimEmbedError):
    """A checkpoint cannot be found, read or exported."""


class VerificationError(OnnxsimEmbedError):
    """An export does not reproduce its reference closely enough to be published."""


class TrainingError(OnnxsimEmbedError):
    """Fine-tuning cannot go on; the message says which checkpoint is kept."""


class TableError(OnnxsimEmbedError):
    """A file of texts or vectors cannot be read or written."""


class NoTextsError(TableError):
    """A file of texts is whole, and empty."""


class MissingExtraError(OnnxsimEmbedError, ImportError):
    """An optional dependency is needed; the message holds the pip command."""

    def __init__(self, purpose: str, extra: str, package: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'onnxsim-embed[{extra}]'"
        )
