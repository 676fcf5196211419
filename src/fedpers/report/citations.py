"""Whom to cite for a run, as BibTeX.

Of methods and data sources, authors, title, venue and year are read from what their files say ("Collins, Hassani:
Title, ICML 2021"), so that a new file brings its own citation along; nothing is looked up and nothing made up.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import metadata

from fedpers.config import Config
from fedpers.data.base import Source
from fedpers.errors import ConfigError
from fedpers.experiment import method_plan
from fedpers.methods.base import Method
from fedpers.models.assets import ASSETS
from fedpers.models.backbone import public_name
from fedpers.plan import encodes
from fedpers.registry import find

HEAD = (
    "% Authors are surnames and venues short where a method's or a data source's own file has no more; complete them."
)
FLOWER = """\
@article{beutel2020flower,
  title={Flower: A Friendly Federated Learning Research Framework},
  author={Beutel, Daniel J and Topal, Taner and Mathur, Akhil and Qiu, Xinchi and Fernandez-Marques, Javier and
          Gao, Yan and Sani, Lorenzo and Kwing, Hei Li and Parcollet, Titouan and Gusm{\\~a}o, Pedro PB de and
          Lane, Nicholas D},
  journal={arXiv preprint arXiv:2007.14390},
  year={2020}
}"""
OPACUS = """\
@article{opacus,
  title={Opacus: {U}ser-Friendly Differential Privacy Library in {PyTorch}},
  author={Ashkan Yousefpour and Igor Shilov and Alexandre Sablayrolles and Davide Testuggine and Karthik Prasad and
          Mani Malek and John Nguyen and Sayan Ghosh and Akash Bharadwaj and Jessica Zhao and Graham Cormode and
          Ilya Mironov},
  journal={arXiv preprint arXiv:2109.12298},
  year={2021}
}"""
PEFT = """\
@misc{peft,
  title={{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods},
  author={Sourab Mangrulkar and Sylvain Gugger and Lysandre Debut and Younes Belkada and Sayak Paul and
          Benjamin Bossan and Marian Tietz},
  howpublished={\\url{https://github.com/huggingface/peft}},
  year={2022}
}"""
_CITED = re.compile(r"(?P<who>.+), (?P<venue>[^,]*?) ?(?P<year>(?:19|20)\d\d)")  # what a method's `cite` looks like
_WORK = re.compile(r"(?P<who>[^:]+): (?P<title>.+?), (?P<venue>[^,]*?) ?(?P<year>(?:19|20)\d\d)")
_ARXIV = re.compile(r",? \(?arXiv[: ](\d{4}\.\d{4,5})\)?")


def bibtex(*configs: Config) -> str:
    """Return the entries of the methods, models, data and programs of runs; a comment where nothing is known."""
    parts = [
        *(method_entry(config.method) for config in configs),
        *(_model_entry(config.model.backbone) for config in configs),
        *(data_entry(config.data.name) for config in configs),
        _fedpers(),
        FLOWER,
        OPACUS if any(config.privacy.unit != "none" for config in configs) else "",
        PEFT if any(map(_adapts, configs)) else "",
    ]
    return "\n".join(dict.fromkeys([HEAD, *filter(None, parts)])) + "\n"


def method_entry(name: str) -> str:
    """Return a method's entry, from its `cite` and the first paragraphs of its docstring."""
    try:
        method = find("methods", name, Method)
    except ConfigError:
        return f"% method {name}: not installed here, so its citation is not known"
    cited = _CITED.fullmatch(method.cite.removeprefix("after "))
    if cited is None:
        return f"% method {name}: {method.cite or 'says nothing of whom to cite'}"
    text = " ".join((method.__doc__ or "").split())
    first = re.split(r",| et al\.", cited["who"])[0]
    when = f"{cited['venue']} {cited['year']}".strip()
    work = re.search(rf"\b({re.escape(first)}(?:, [^:.,]+)*(?: et al\.)?): (.+?), {re.escape(when)}\b", text)
    who, title = work.groups() if work else (cited["who"], f"({name})")
    arxiv = _ARXIV.match(text[work.end() :]) if work else None
    return _entry(f"{first}{cited['year']}{name}", who, title, cited["venue"], cited["year"], arxiv and arxiv[1])


def _model_entry(backbone: str) -> str:
    name = public_name(backbone)
    asset = ASSETS.get(name)
    return asset.citation if asset else f"% model {name}: no citation is known here"


def data_entry(name: str) -> str:
    """Return a data source's entries: those of its asset, or what its own line says."""
    try:
        source = find("data", name, Source)  # type: ignore[type-abstract]
    except ConfigError:
        return f"% data {name}: not installed here, so its citation is not known"
    asset = ASSETS.get(getattr(sys.modules[source.__module__], "ASSET", name))
    if asset is not None and asset.kind == "data":
        return asset.citation
    arxiv = _ARXIV.search(source.citation)
    work = _WORK.fullmatch(_ARXIV.sub("", source.citation))
    if work is None:
        return f"% data {name}: its file says {source.citation or 'nothing'!r} of whom to cite"
    first = re.split(r",| et al\.", work["who"])[0]
    key = f"{first}{work['year']}{name}"
    return _entry(key, work["who"], work["title"], work["venue"], work["year"], arxiv and arxiv[1])


def _entry(key: str, who: str, title: str, venue: str, year: str, arxiv: str | None) -> str:
    names = [f"{{{name}}}" if " " in name else name for name in who.removesuffix(" et al.").split(", ")]
    fields = {"title": f"{{{title}}}", "author": " and ".join([*names, *(["others"] if "et al." in who else [])])}
    fields |= {"booktitle": venue} if venue else {}
    fields |= {"year": year} | ({"eprint": arxiv, "archiveprefix": "arXiv"} if arxiv else {})
    body = ",\n".join(f"  {name}={{{value}}}" for name, value in fields.items())
    return f"@{'inproceedings' if venue else 'misc'}{{{re.sub('[^a-z0-9]', '', key.lower())},\n{body}\n}}"


def _fedpers() -> str:
    about = metadata("fedpers")
    return (
        f"@software{{fedpers,\n  title={{fedpers: {about['Summary']}}},\n  author={{{{The fedpers authors}}}},\n"
        f"  version={{{about['Version']}}}\n}}"
    )


def _adapts(config: Config) -> bool:
    """Whether LoRA adapters are trained; of a method that is not installed here that is what is configured."""
    try:
        return encodes(method_plan(config.method, config).trained)
    except ConfigError:
        return encodes(config.share)
