"""A filter as somebody might write it, for the tests of `prepare --filters`."""

from datatrove.pipeline.filters.base_filter import BaseFilter


class Longer(BaseFilter):
    """Drops texts of few words, takes a word out of others, and stumbles over one."""

    def __init__(self, words: int = 3, without: str = "secret"):
        super().__init__()
        self.words, self.without = words, without

    def filter(self, doc):
        if "stumble" in doc.text:
            raise IndexError("no such word")
        doc.text = doc.text.replace(self.without, "").strip()
        found = len(doc.text.split())
        return found >= self.words or (False, f"of {found} words")
