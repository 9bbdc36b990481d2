"""What the adapters share: a model by name, loaded at its first use, pickled as its name."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakValueDictionary

from onnxsim_embed.runtime.embedder import Embedder

# Adapters with equal settings share one model while any of them lives: a pipeline often embeds
# documents with one component and queries with another, and a grid search clones its steps.
_living: WeakValueDictionary[ModelSettings, Embedder] = WeakValueDictionary()
_loading = threading.Lock()


@dataclass(frozen=True)
class ModelSettings:
    """Which model to load, and how; see `Embedder.from_pretrained`.

    :param name: recipe name, artifact directory, checkpoint directory or Hub id.
    """

    name: str
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None


class LazyModel:
    """A model that is loaded when it is first used. Pickles and copies carry the settings alone.

    :param settings: which model, or one that is loaded already (and does not pickle).
    """

    def __init__(self, settings: ModelSettings | Embedder) -> None:
        self.settings = None if isinstance(settings, Embedder) else settings
        self._model = settings if isinstance(settings, Embedder) else None

    def get(self) -> Embedder:
        """Return the model, loading it where that has not been done.

        :raises CheckpointError: if it cannot be found or exported.
        :raises ArtifactError: if it is damaged.
        :raises ValueError: if the precision or device is not there.
        """
        if self._model is None:
            assert self.settings is not None
            self._model = _load(self.settings)
        return self._model

    def __getstate__(self) -> dict[str, object]:
        if self.settings is None:
            raise TypeError(
                "an adapter that was given a loaded Embedder does not pickle; give it the model's "
                "name or directory instead"
            )
        return {"settings": self.settings, "_model": None}


def _load(settings: ModelSettings) -> Embedder:
    with _loading:
        model = _living.get(settings)
        if model is None:
            model = Embedder.from_pretrained(
                settings.name,
                precision=settings.precision,
                device=settings.device,
                threads=settings.threads,
            )
            _living[settings] = model
        return model
