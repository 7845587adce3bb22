"""The 28 sources of configs/stablelm_2_1_6b.py, as far as it is known where they lie.

No primary text links a row of the report's table of sources to a place: the model card names six
data sets, everything finer is concluded from names and sizes. `likely` says how likely a place
holds what was trained on, `certainty` how sure its path and its keys are. Tokens and epochs are the
report's (arXiv 2402.17834), not re-verified; the epochs have no checksum. Facts were gathered in
November 2026 without a request to any of these servers.

Revisions are pinned here only where a whole commit was seen. Of the others the note gives the
beginning, and the first listing pins what it finds in the manifest. Of copies in several sources
the one that stands first keeps its own: edited texts before books, law, talk, and pages of the web.
"""

from stablelm_jax.preparation.recipes import (
    GONE,
    INFERRED,
    MEMORY,
    SUBSTITUTE,
    TOLD,
    Origin,
    Recipe,
    RecipeSource,
)

_PAGES = "https://huggingface.co/datasets"


def _source(name: str, tokens: int, epochs: float, *places: Origin, **facts) -> RecipeSource:
    """A source with its tokens and epochs in the run; in English if nothing else is said."""
    facts = {"languages": ("en",), **facts}
    return RecipeSource(name, places, tokens=tokens, epochs=epochs, **facts)


def _hub(repository: str, *patterns: str, gated: bool = False, **facts) -> Origin:
    """Files of a repository of the Hugging Face Hub."""
    files = tuple(f"hf://datasets/{repository}/{pattern}" for pattern in patterns)
    return Origin(files, gate=f"{_PAGES}/{repository}" if gated else "", **facts)


def _redpajama(part: str, **facts) -> Origin:
    """RedPajama-1T: uncompressed jsonl files on a web server, which `urls.txt` lists."""
    urls = "https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"
    note = "whether the server still gives the files was not tried"
    facts = {"note": note, "format": "jsonl", **facts}
    return Origin(listed=(urls, f"*/{part}/*"), **facts)


def _dolma(files: str, note: str = "", **facts) -> Origin:
    """Dolma 1.7: another group's filtered and deduplicated copies, whose counts differ."""
    commit = "7f48140530a023e9ea4c5cfb141160922727d4d3"
    urls = f"{_PAGES}/allenai/dolma/resolve/{commit}/urls/v1_7.txt"
    note = "; ".join(filter(None, (note, "filtered and deduplicated by others: counts differ")))
    return Origin(
        listed=(urls, f"*/{files}"), state=SUBSTITUTE, licence="ODC-By", note=note, **facts
    )


def _pile(name: str, licence: str, **facts) -> tuple[Origin, ...]:
    """A component of the Pile in its 30 shards, which hold them all; and a mirror of these.

    338 GB: the 338 MB of validation, as seen, are a thousandth of the Pile (memory). The keys are
    those of the Pile (memory).
    """
    facts = {
        "keep": (("meta.pile_set_name", name),),
        "licence": licence,
        "certainty": MEMORY,
        "gigabytes": 338,
        **facts,
    }
    files, mirror = "train/*.jsonl.zst", {**facts, "note": "a mirror of the first place"}
    place = _hub("monology/pile-uncopyrighted", files, **facts)
    return place, _hub("RichardErkhov/pile-uncopyrighted", files, **mirror)


def _common_pile(name: str, commit: str, licence: str, **facts) -> Origin:
    """The Common Pile's selection of openly licensed texts: a stand-in, smaller and cleaner."""
    facts = {"certainty": TOLD, "note": f"seen at {commit}", **facts}
    repository = f"common-pile/{name}_filtered"
    return _hub(repository, "*.json.gz", state=SUBSTITUTE, licence=licence, **facts)


def _culturax(language: str, script: str, tokens: int, epochs: float, gigabytes: float):
    """The part of CulturaX that comes from OSCAR: mC4's rows were left out (report)."""
    oscar = _hub(
        "uonlp/CulturaX",
        f"{language}/*.parquet",
        keep=(("source", "OSCAR*"),),
        licence="ODC-By and CC0 for the packaging, none for the texts",
        gated=True,
        likely="high",
        gigabytes=gigabytes,
        note="rows of mC4 are most of the bytes, read and thrown away",
    )
    fineweb = {"state": SUBSTITUTE, "licence": "ODC-By"}
    if language == "en":
        files, filters = "sample/350BT/*.parquet", ("gopher", "fineweb", "language")
        other = _hub("HuggingFaceFW/fineweb", files, certainty=MEMORY, **fineweb)
    else:
        files, filters = f"data/{script}/train/*.parquet", ("gopher", "language")
        other = _hub("HuggingFaceFW/fineweb-2", files, **fineweb)
    facts = {"languages": (language,), "filters": filters}
    return _source(f"culturax_{language}", tokens, epochs, oscar, other, **facts)


_LATEX = "LaTeX and tables break rules about words and lines"
_BOOK = "rules for web pages refuse books: more than 100,000 words"
_PAPERS_TERMS = "of each paper"

# The facts of a place stand in few lines.
# fmt: off
_WIKIPEDIAS = "bg ca cs da de en es fr hr hu it nl pl pt ro ru sl sr sv uk".split()

_KNOWLEDGE = (
    _source("redpajama_wiki", 72_866_870_472, 3.0,
        _redpajama("wikipedia", licence="CC BY-SA", likely="high", gigabytes=111),  # memory
        _hub("wikimedia/wikipedia",
            *(f"20231101.{language}/train-*.parquet" for language in _WIKIPEDIAS),
            state=SUBSTITUTE, licence="CC BY-SA", certainty=MEMORY, note="eight months younger"),
        languages=tuple(_WIKIPEDIAS),
        unfiltered="edited text, 20 languages in one source"),
    _source("philpapers", 2_591_115_796, 4.0,
        *_pile("PhilPapers", _PAPERS_TERMS, likely="high"),
        unfiltered=_BOOK,
        note="several languages, English most of all"),
    _source("arxiv", 15_852_446_656, 0.75,
        _redpajama("arxiv", licence=_PAPERS_TERMS, likely="medium", gigabytes=88),  # memory
        _common_pile("arxiv_papers", "033cf7f", "CC BY, CC0"),
        _dolma("arxiv-*.json.gz"),
        _pile("ArXiv", _PAPERS_TERMS, state=SUBSTITUTE)[0],
        unfiltered=_LATEX),
    _source("pubmed", 24_126_600_626, 1.0,
        _hub("CarperAI/pilev2-dev", "data/pubmed/PubMed_*.parquet",
            licence="of each paper; the set's own was not found",
            gated=True, likely="high",
            gigabytes=50,  # inferred: half of the text
            note="47 files; whether it is still there was not tried"),
        _common_pile("pubmed", "c156f05", "open, of each paper"),
        _pile("PubMed*", _PAPERS_TERMS, state=SUBSTITUTE)[0],
        unfiltered="tables and references break rules about words and lines"),
    _source("s2orc", 63_910_567_858, 1.0,
        _hub("allenai/peS2o", "data/v1/train-*.json.gz",
            licence="ODC-By", likely="medium",
            gigabytes=100,  # inferred: a third of the text
            note="v1, whose 67.6 B tokens (memory) fit the report's 63.9 B; pilev2 had its own"),
        _hub("allenai/peS2o", "data/v2/train-*-of-00020.json.gz",
            state=SUBSTITUTE,
            licence="ODC-By", note="v2, 39.0 M documents, 42.0 B tokens"),
        _dolma("pes2o-*.json.gz"),
        _common_pile("peS2o", "2977475", "open, of each paper"),
        unfiltered=_LATEX),
)

_BOOKS = (
    _source("pg19", 18_293_226_468, 4.0,
        _hub("emozilla/pg19", "data/train-*-of-00023-*.parquet",
            licence="public domain (US)", likely="medium", gigabytes=6.5,
            note="2.9 B tokens (memory) where the report implies 4.6 B an epoch"),
        _common_pile("project_gutenberg", "3cdf687", "public domain (US)"),
        _common_pile("pre_1929_books", "", "public domain (US)", note="scanned books"),
        unfiltered=_BOOK),
    _source("bookcorpus_open", 9_135_954_810, 6.0,
        _hub("lucadiliello/bookcorpusopen", "data/train-*.parquet",
            licence="unclear: the authors', not given for this use", likely="high",
            certainty=MEMORY,
            gigabytes=4,  # inferred: 6.5 GB of text
            note="17,868 books"),
        Origin(state=GONE,
            note="bookcorpusopen, the script of the original: its host gives nothing any more"),
        unfiltered=_BOOK),
    _source("fanfics", 3_644_583_700, 4.0,
        _hub("atom-in-the-universe/fanfics-10k-50k", "*.parquet",
            text_key="TEXT",
            licence="none stated: the authors'", likely="medium",
            gigabytes=2,  # inferred: 3.6 GB of text
            note="that the report's authors made it is not proven"),
        _hub("ray0rf1re/AO3-2020", "**",
            state=SUBSTITUTE, licence="CC BY-NC 4.0",
            certainty=MEMORY, note="its files and keys were not seen: look at a --sample first"),
        unfiltered="chosen by perplexity already (report); long stories",
        note="the authors keep their rights: think before you take it"),
)

_EURO = "bg cs da de el en es et fi fr hu it lt lv nl pl pt ro sk sl sv".split()
_PILE_OF_LAW = "pile-of-law/pile-of-law@2e96169e7e4b43f8ea36230515ebb44b27423b94"

_LAW = (
    _source("europarl", 4_678_506_882, 3.0,
        *_pile("EuroParl", "free to use, of the European Parliament", likely="high"),
        _hub(_PILE_OF_LAW, "data/train.euro_parl.jsonl.xz",
            state=SUBSTITUTE,
            licence="CC BY-NC-SA 4.0", certainty=INFERRED,
            note="English alone, and part of pile_of_law: do not count it twice"),
        languages=tuple(_EURO),
        unfiltered="edited proceedings, 21 languages in one source"),
    _source("freelaw", 17_694_697_577, 1.2,
        *_pile("FreeLaw", "public domain", likely="medium"),
        _common_pile("caselaw_access_project", "50e1961", "public domain"),
        unfiltered="citations and headings break rules about lines",
        note="the Pile holds its first build, 3.6 M opinions; a second had 4.9 M"),
    _source("pile_of_law", 12_663_061_642, 0.75,
        _hub(_PILE_OF_LAW, "data/train.*.jsonl.xz",
            licence="CC BY-NC-SA 4.0: not for commercial use", likely="high", certainty=TOLD,
            gigabytes=33,  # 44 GB, a quarter of which is validation
            note="holds LexGLUE's and LegalBench's texts: decontaminate"),
        unfiltered="citations and headings break rules about lines",
        note="256 GB of text, of which the report's epoch is about 30 %"),
)

_SOCIAL = (
    _source("stackexchange", 46_302_993_820, 2.5,
        _redpajama("stackexchange", licence="CC BY-SA", likely="medium", gigabytes=80),
        _common_pile("stackexchange", "c0ac737", "CC BY-SA", note="27.5 M documents, 105 GB"),
        _dolma("stackexchange-*.json.gz"),
        _pile("StackExchange", "CC BY-SA", state=SUBSTITUTE)[0],
        unfiltered="code and formulas stand among the words"),
    _source("hackernews", 3_817_060_582, 2.0,
        *_pile("HackerNews", "the site's terms", likely="medium"),
        unfiltered="short lines of a discussion",
        note="the report implies twice the Pile's size: a later copy, or other epochs"),
)

_MATHEMATICS = (
    _source("openwebmath", 26_530_341_292, 2.0,
        _hub("open-web-math/open-web-math", "data/*.parquet",
            licence="ODC-By",
            likely="high",
            gigabytes=27,  # memory
            note="6.3 M documents, 14.7 B tokens"),
        _dolma("open-web-math-train-*.json.gz"),
        unfiltered="formulas; its own rules were applied to it"),
    _source("dm_math", 13_321_872_138, 3.0,
        *_pile("DM Mathematics", "Apache-2.0", likely="high"),
        Origin(("https://storage.googleapis.com/mathematics-dataset/"
             "mathematics_dataset-v1.0.tar.gz",),
            state=SUBSTITUTE, format="text", split_on="64kB", licence="Apache-2.0",
            note="lines of question and answer in turn; its folders interpolate and extrapolate"
            " are for evaluation: unpack it and leave them out"),
        unfiltered="exercises without prose"),
    _source("amps", 2_126_719_278, 6.0,
        _hub("minimalt/MATH_amps", "amps.tar.gz",
            licence="MIT (of another copy)",
            likely="high", certainty=TOLD, gigabytes=0.292,
            note="4.9 M small files in one archive: one task; its first place answers 403"),
        _hub("yulan-team/YuLan-Mini-Text-Datasets", "math/AMPS_mathematica/*.jsonl",
            state=SUBSTITUTE, licence="MIT", certainty=MEMORY, gigabytes=0.453,
            note="one of its two parts; the key was not seen"),
        unfiltered="exercises without prose"),
)

_OTHERS = (
    _source("starcoder", 145_586_775_301, 0.74,
        _hub("bigcode/starcoderdata", "*/*.parquet",
            text_key="content",
            licence="of each file, permissive", gated=True,
            likely="high", certainty=TOLD, gigabytes=783,
            note="86 languages, notebooks, issues, commits; its marks such as <reponame> stay"
            " plain text; seen at 9fc30b5"),
        _dolma("starcoder-*.json.gz"),
        languages=(),
        unfiltered="code"),
    _source("restruct_v1", 20_412_655_632, 3.0,
        Origin(state=GONE, note="never published: instruction data, restructured"),
        _common_pile("data_provenance_initiative", "8f5afcf", "open, of each set"),
        _hub("DataProvenanceInitiative/Commercially-Verified-Licenses", "data/*/*.jsonl",
            state=SUBSTITUTE, text_key="inputs", licence="of each collection", certainty=MEMORY,
            note="named by the model card; answers lie under another key, labels: put both in"
            " one text first"),
        unfiltered="prompts and answers, no pages"),
)

_WEB = (
    _source("openwebtext2", 26_161_864_434, 3.0,
        _hub("segyges/OpenWebText2", "openwebtext2.jsonl.zst.tar",
            licence="none stated: web pages", likely="high",
            gigabytes=27,  # inferred: 62.8 GiB of text
            note="one archive is one task: the parquet files of place 2 are read in parallel"),
        _hub("vietgpt/the_pile_openwebtext2", "data/train-*-of-00035-*.parquet",
            licence="none stated: web pages", likely="high",
            gigabytes=35,  # inferred
            note="seen at 1de27c6"),
        filters=("gopher",),
        note="the report's epoch is 60 % of it: a deduplicated copy was trained on"),
    _source("c4", 171_782_178_108, 1.0,
        _hub("allenai/c4", "en/c4-train.*-of-01024.json.gz",
            licence="ODC-By, and Common Crawl's terms", likely="high", gigabytes=305),
        _redpajama("c4", state=SUBSTITUTE, licence="ODC-By", gigabytes=806),  # memory
        _dolma("c4-*.json.gz"),
        filters=("gopher",),
        note="C4's own rules were applied to it"),
    _source("refinedweb", 661_591_178_339, 1.15,
        _hub("tiiuae/falcon-refinedweb", "data/train-*-of-05534-*.parquet",
            text_key="content", licence="ODC-By", likely="high", gigabytes=500,
            note="968,000,015 rows; seen at c735840"),
        _dolma("falcon-*.json.gz"),
        unfiltered="Gopher's rules, language and near copies were seen to already"),
    # Gigabytes: 16 TB in all, of which 45 % English (seen, second hand); 2.5 bytes a token of the
    # languages' counts (memory), which gives German's 0.9 TB.
    _culturax("de", "deu_Latn", 30_628_813_934, 0.32, 900),
    _culturax("en", "eng_Latn", 506_625_211_049, 0.72, 7000),
    _culturax("es", "spa_Latn", 31_241_701_156, 0.4, 940),
    _culturax("fr", "fra_Latn", 19_466_611_808, 0.26, 800),
    _culturax("it", "ita_Latn", 19_202_903_491, 0.4, 415),
    _culturax("nl", "nld_Latn", 19_511_322_386, 0.62, 200),
    _culturax("pt", "por_Latn", 20_063_968_694, 0.78, 345),
)

RECIPE = Recipe(
    name="stablelm_2",
    config="stablelm_2_1_6b.py",
    about="tokens and epochs: the technical report's table, not re-verified; which place holds what"
    " was trained on is concluded from names and sizes",
    sources=(*_KNOWLEDGE, *_BOOKS, *_LAW, *_SOCIAL, *_MATHEMATICS, *_OTHERS, *_WEB),
)
