"""How near written texts are to the real ones: ROUGE by Google's `rouge-score`, METEOR by `nltk`.

Texts come in pairs, what was written and what is true; each gives one number from 0 to 1. Of an empty text it is 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from fedpers.errors import ConfigError

Pairs = Sequence[tuple[str, str]]  # (written, true)
_NO_SYNONYMS = SimpleNamespace(synsets=lambda word: ())  # the one thing of a WordNet reader that METEOR asks


def rouge(pairs: Pairs) -> dict[str, list[float]]:
    """Return ROUGE-1 and ROUGE-L of each pair, F-measures without stemming (Lin, 2004).

    Raises ConfigError without the library.
    """
    scorer = _library("rouge_score.rouge_scorer", "ROUGE", "rouge-score==0.1.2").RougeScorer(["rouge1", "rougeL"])
    found = [scorer.score(truth, said) for said, truth in pairs]
    return {
        name: [float(one[kind].fmeasure) for one in found]
        for name, kind in (("rouge-1", "rouge1"), ("rouge-L", "rougeL"))
    }


def meteor(pairs: Pairs) -> dict[str, list[float]]:
    """Return METEOR of each pair, with nltk's parameters (Lavie and Agarwal, 2007), under a name that says which.

    `meteor` matches words that are the same, of one stem or synonyms, for which it needs the WordNet data of nltk
    (`python -m nltk.downloader wordnet`). Where they are not installed it is `meteor_exact_stem`, METEOR without
    synonyms, which is not to be compared with the other. Words are split from punctuation
    by a regular expression that needs no data, so numbers differ a little from those of tokenizers that do.

    Raises ConfigError without the library.
    """
    library = _library("nltk.translate.meteor_score", "METEOR", "nltk==3.10.4")
    split = importlib.import_module("nltk.tokenize").wordpunct_tokenize
    wordnet: Any = importlib.import_module("nltk.corpus").wordnet
    name = "meteor"
    try:
        wordnet.ensure_loaded()
    except LookupError:
        wordnet, name = _NO_SYNONYMS, "meteor_exact_stem"
    return {
        name: [float(library.single_meteor_score(split(truth), split(said), wordnet=wordnet)) for said, truth in pairs]
    }


def _library(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{what} needs {package.partition('==')[0]}; run `pip install {package}`.") from None
