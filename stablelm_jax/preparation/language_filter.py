"""The filter by language: fastText's identifier as datatrove runs it, or py3langid's."""

from __future__ import annotations

from collections.abc import Sequence

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.lid import FT176LID, LID


class Py3langid(LID):
    """py3langid as one of datatrove's identifiers: its model comes with the package."""

    def __init__(self, languages: list[str]):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        super().__init__(languages)
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def predict(self, doc: Document) -> tuple[tuple[str, float], dict[str, float]]:
        """(the likeliest label and its probability, the probabilities of `languages`)."""
        ranked = self._identifier.rank(doc.text)
        found = dict(ranked)
        return ranked[0], {label: found.get(label, 0.0) for label in self.languages}


class LanguageFilter(BaseFilter):
    """Keeps a document to which the model gives one of the languages by more than `threshold`.

    The rule is that of datatrove's LanguageFilter, which needs fastText whatever identifies, and
    gives no reason.

    Args:
      languages: ISO 639-1 codes; `prepare` puts in those of the source.
      backend: py3langid; or ft176, fastText's model of 176 languages, which FineWeb used.
      model: a file for ft176, lid.176.bin or lid.176.ftz; datatrove downloads it if none is given.
    """

    def __init__(
        self,
        languages: Sequence[str] = (),
        threshold: float = 0.65,
        backend: str = "py3langid",
        model: str = "",
    ):
        super().__init__()
        self._languages, self._threshold = list(languages), threshold
        if backend == "py3langid":
            self._identifier: LID = Py3langid(self._languages)
        elif backend == "ft176":
            self._identifier = FT176LID(self._languages)
            if model:  # datatrove would copy the file, and keep to the copy
                from fasttext.FastText import _FastText

                self._identifier._model = _FastText(model)
        else:
            raise ValueError(f"backend={backend}: there are py3langid and ft176")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        (best, _), found = self._identifier.predict(doc)
        if any(share > self._threshold for share in found.values()):
            return True
        return False, f"not sure of {best}" if best in found else f"looks like {best}"
