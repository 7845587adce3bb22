"""The eight sources of configs/demo_multilingual.py: help pages of seven languages, and code.

launch/demo_corpus.sh leaves their documents in DATA/downloads, out of Debian's packages; then

    python -m stablelm_jax.prepare --recipe demo --source all --output DATA \\
        --tokenizer DATA/tokenizer.json

makes token shards of them. The text is the same in each language, so `--near` of a deduplication
must not take a page's translations for copies of it.
"""

from stablelm_jax.preparation.recipes import Origin, Recipe, RecipeSource


def _help(language: str) -> RecipeSource:
    name = f"libreoffice_help_{language}"
    place = Origin(("{output}/downloads/" + name + ".jsonl",), licence="MPL-2.0", likely="high")
    # Of the filters, this one alone is right about such pages: docs/data.md.
    return RecipeSource(name, (place,), (language,), filters=("language",))


_CODE = RecipeSource(
    "stdlib_code",
    (Origin(("{output}/downloads/stdlib_code.jsonl",), licence="PSF-2.0", likely="high"),),
    unfiltered="code",
)

RECIPE = Recipe(
    name="demo",
    config="demo_multilingual.py",
    about="LibreOffice's help and Python's standard library, as launch/demo_corpus.sh gets them",
    sources=(*map(_help, ("en", "de", "es", "fr", "it", "nl", "pt")), _CODE),
)
