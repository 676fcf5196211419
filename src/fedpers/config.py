"""The configuration of a run: YAML, checked by pydantic, with overrides `key.path=value` from the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from fedpers.errors import ConfigError
from fedpers.privacy.randomness import secret_key

Family = Literal["adapter", "norm", "head"]
FAMILIES: tuple[Family, ...] = get_args(Family)  # what a configuration names
GROUPS = ("A", "B", "A2", "B2", "gate", "residual", "norm", "head")  # what a method's table may tell apart
PLAIN = ("A", "B", "head")  # the groups that every model has; the others are there where a method uses them
FAMILY = {group: group if group in FAMILIES else "adapter" for group in GROUPS}
ALIASES = {"adapter": ("A", "B"), "adapter2": ("A2", "B2")}


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Replace `adapter` and `adapter2` by their two factors; other names stay as they are."""
    return tuple(dict.fromkeys(group for name in names for group in ALIASES.get(name, (name,))))


def spoken(groups: Iterable[str]) -> tuple[str, ...]:
    """Put both factors of an adapter together again, for texts."""
    found = list(groups)
    for name, pair in ALIASES.items():
        if set(pair) <= set(found):
            found = [name if group == pair[0] else group for group in found if group != pair[1]]
    return tuple(found)


def _groups(value: Any) -> Any:
    return tuple(value.split("+")) if isinstance(value, str) else value


def _join(value: tuple[str, ...]) -> str:
    return "+".join(value)


Groups = Annotated[
    tuple[Family, ...],
    BeforeValidator(_groups),
    PlainSerializer(_join),
    Field(min_length=1),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # an input may be the secret


class ColumnsConfig(Section):
    """Which columns of the user's own files hold what."""

    user: str = "user"
    input: str | None = "input"  # null: there is none, such as where a language model learns texts as they are
    target: str = "target"
    time: str | None = None  # when a record was made; without it the order in the files counts
    id: str | None = None  # distinct within a user; by default a hash of the row
    conversation: str | None = None  # what must not be split between training and test, across users too


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


class LampConfig(Section):
    """Which part of LaMP (Salemi et al., ACL 2024), and how its profiles are used."""

    task: Annotated[Literal["1", "2", "2-news", "3", "4", "5", "6", "7"], BeforeValidator(_text)] = "3"
    split: Literal["user", "time"] = "user"  # user: each question is a person of its own; time: `user_id` says whose
    part: Literal["train", "dev"] = "dev"  # whose questions are the test; those of LaMP's test part have no answers
    form: Literal["prompt", "text"] = "prompt"  # inputs as the benchmark words them, or the bare text
    retrieve: int = Field(0, ge=0, le=16)  # history items of the same user put before each input
    retriever: Literal["bm25", "recency"] = "bm25"
    history: float = Field(0.5, gt=0, lt=1)  # with retrieve: probability that an item is only retrieved, not trained on
    tokenizer: str | None = None  # with retrieve: the backbone, by whose tokens the prompt is kept to max_tokens

    @model_validator(mode="after")
    def _counted(self) -> LampConfig:
        if self.retrieve and self.tokenizer is None:
            raise ValueError(
                "retrieve > 0 needs data.lamp.tokenizer, the backbone's name or folder: retrieved items must leave "
                "room for the question within data.max_tokens"
            )
        if self.retrieve and self.form == "text":
            raise ValueError("retrieve > 0 needs form=prompt, in which the benchmark words retrieved items")
        return self


class DataConfig(Section):
    """Whose records, and how many of them."""

    name: str = "chitchat"
    people: Literal["federation", "development"] = "federation"  # development: other people, to tune on
    users: int | None = Field(None, ge=1)  # at most so many users, chosen by user id
    min_train: int = Field(15, ge=1)
    min_test: int = Field(5, ge=1)
    max_train: int = Field(60, ge=1)  # records per user; bounds what one heavy user costs and shapes
    max_test: int = Field(40, ge=1)
    max_tokens: int = Field(48, ge=4, le=512)
    path: str | None = None  # files: a file, folder, pattern or hub:owner/name; lamp: the folder of its JSON files
    columns: ColumnsConfig = ColumnsConfig()  # files
    test_share: float = Field(0.3, gt=0, lt=1)  # files: the last share of each user's records is for testing
    skip_bad: bool = False  # files, lamp: leave unusable records out and count them, instead of stopping at the first
    pool: bool = False  # files: the people whose id says "pool" are no members; their targets are the public texts
    lamp: LampConfig = LampConfig()

    @model_validator(mode="after")
    def _caps(self) -> DataConfig:
        for part in ("train", "test"):
            low, high = getattr(self, f"min_{part}"), getattr(self, f"max_{part}")
            if low > high:
                raise ValueError(f"min_{part}={low} exceeds max_{part}={high}, so no user could take part")
        return self


def _labels(value: Any) -> Any:
    """Take whole numbers as texts; YAML's yes and no are truth values, and one text is no list."""
    if isinstance(value, str):
        raise ValueError("expected a list, as labels: [good, bad]")
    if isinstance(value, list | tuple) and any(isinstance(one, bool | float) for one in value):
        raise ValueError("quote labels that YAML takes for something else: labels: ['yes', 'no']")
    return [str(one) if isinstance(one, int) else one for one in value] if isinstance(value, list | tuple) else value


Labels = Annotated[tuple[str, ...], BeforeValidator(_labels)]


class TaskConfig(Section):
    """What is learnt."""

    name: str = "reply-ranking"
    candidates: int = Field(10, ge=2, le=100)  # the true reply and so many minus one others
    scale: Positive | None = None  # what a head multiplies its products by; by default the task's own number
    low: float = 1.0  # rating: the public scale
    high: float = 5.0
    labels: Labels = ()  # classification: the public list of labels


class AdapterConfig(Section):
    """LoRA (Hu et al., ICLR 2022) on the top layers of the backbone."""

    layers: int = Field(1, ge=1)
    rank: int = Field(4, ge=1)
    alpha: Positive = 8.0
    targets: tuple[str, ...] = ("query", "value")


class ModelConfig(Section):
    """The frozen backbone and what is trained on top of it."""

    backbone: str = "all-MiniLM-L6-v2"  # an asset's name, a local path or a Hugging Face id
    adapter: AdapterConfig = AdapterConfig()


class LearningRates(Section):
    """One step size for each parameter group."""

    adapter: Positive = 0.5
    norm: Positive = 0.1
    head: Positive = 0.1


class TrainConfig(Section):
    """Local training in a round, on the groups that the method moves."""

    epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: LearningRates = LearningRates()


class PersonalConfig(TrainConfig):
    """Training of personal state: in the rounds for personal groups, and at home after the last release."""

    epochs: int = Field(5, ge=1)
    groups: Groups = ("head",)  # what is tuned at home after the last release
    l2: float = Field(0.01, ge=0)  # pull toward the values that training at home starts from


class ServerConfig(Section):
    """A stock Flower strategy turns the clients' arrays into the next broadcast."""

    strategy: str = "FedAvg"
    options: dict[str, float | int] = {}


def _epsilon(value: Any) -> Any:
    return math.inf if isinstance(value, str) and value.strip().lower() in {"inf", ".inf", "none"} else value


Epsilon = Annotated[
    float,
    BeforeValidator(_epsilon),
    Field(gt=0),
    PlainSerializer(lambda v: "inf" if math.isinf(v) else v, return_type=float | str, when_used="json"),
]


Unit = Literal["none", "record", "user"]
Trust = Literal["none", "record-local", "user-central", "user-distributed", "user-local"]
HeadPolicy = Literal["method", "frozen", "joint", "split", "split-dp"]
TRUSTS: dict[Unit, tuple[Trust, ...]] = {  # the first is the default
    "none": ("none",),
    "record": ("record-local",),
    "user": ("user-central", "user-distributed", "user-local"),
}


class AdaptiveClipConfig(Section):
    """Adaptive clipping at user level (Andrew et al., NeurIPS 2021): the clip follows a quantile of update norms."""

    quantile: float = Field(0.5, gt=0, lt=1)  # share of updates that should lie within the clip
    rate: Positive = 0.2  # step of the geometric update
    bit_noise: Positive | None = None  # noise deviation on the sum of bits; by default a twentieth of the cohort


class PrivacyConfig(Section):
    """What is protected, how strongly, and who is trusted."""

    unit: Unit = "none"
    trust: Trust | None = None  # by default record-local, or user-central
    epsilon: Epsilon = math.inf
    delta: float = Field(1e-5, gt=0, lt=1)
    clip: Positive | None = None  # L2 bound on one record's gradient or one user's update
    clipping: Literal["flat", "per-layer"] = "flat"  # per-layer: each array to clip/sqrt(arrays), the same joint bound
    adaptive: AdaptiveClipConfig | None = None  # user-central: clip is then the first round's
    head: HeadPolicy = "method"  # what is done about personal groups that move in the rounds
    record_rate: Rate = 0.25  # Poisson rate of records in a local DP-SGD step
    mechanism: Literal["gaussian", "banded"] = "gaussian"  # banded: correlated noise, no sampling amplification
    bands: int | None = Field(None, ge=2)  # of the banded noise; by default the rounds between a client's turns
    honest: Rate = 0.9  # user-distributed: share of a round's clients whose noise has to be enough
    noise_multiplier: Positive | None = None  # given, it is used as it is; by default calibrated to epsilon
    stop: Literal["rounds", "budget"] = "rounds"  # budget: end before the ledger would pass epsilon
    schedule: Literal["constant", "signal"] = "constant"  # signal: less noise when releases hold little but noise
    population: int | None = Field(None, ge=1)  # forecast: what so many registered users would get
    accountant: Literal["pld", "rdp", "prv", "gdp"] = "pld"
    secret: str | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _complete(self) -> PrivacyConfig:
        if self.secret is not None:
            secret_key(self.secret)  # its error does not quote what was given
        if self.unit == "none" and not math.isinf(self.epsilon):
            raise ValueError(
                f"epsilon={self.epsilon} is asked for but unit is none; set privacy.unit to record or user, or "
                "privacy.epsilon=inf"
            )
        if self.unit != "none" and self.clip is None:
            raise ValueError(f"unit={self.unit} needs privacy.clip, the L2 bound on one {self.unit}'s contribution")
        if self.trust is not None and self.trust not in TRUSTS[self.unit]:
            right = next(unit for unit, trusts in TRUSTS.items() if self.trust in trusts)
            raise ValueError(
                f"trust={self.trust} does not go with unit={self.unit}; unit={self.unit} allows "
                f"{' or '.join(TRUSTS[self.unit])}, trust={self.trust} needs privacy.unit={right}"
            )
        if self.stop == "budget" and math.isinf(self.epsilon):
            raise ValueError("stop=budget needs a finite epsilon, the budget to stop at")
        return self

    @property
    def trusted(self) -> Trust:
        """The trust model, with the unit's default where none is given."""
        return self.trust or TRUSTS[self.unit][0]


class EngineConfig(Section):
    """How the work is cut; none of it changes results beyond float tolerance."""

    cohort_size: int = Field(16, ge=1)
    token_budget: int = Field(4096, ge=512)
    threads: int = Field(2, ge=1)


class EvaluationConfig(Section):
    """What is measured on the way."""

    every: int = Field(1, ge=0)  # rounds between evaluations of the shared model; 0: never
    local_only: bool = True  # also train one model per user without federation


class FrontierConfig(Section):
    """A small privacy-utility picture: each method at each epsilon, with the rest of the configuration as it is."""

    share: Groups | None = None  # what the picture's runs share, if not what the main run shares
    methods: tuple[str, ...] = Field(min_length=1)
    epsilons: tuple[Epsilon, ...] = Field(min_length=1)


class Config(Section):
    """Everything that defines a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    method: str = "fedavg-finetune"
    options: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}  # the method's own numbers, by name
    share: Groups = FAMILIES  # groups that may be shared; one that the method would share and is not listed is frozen
    rounds: int = Field(10, ge=0)
    client_rate: Rate = 1.0  # share of the clients in a round
    # poisson: each independently with this probability; fixed: so many, drawn; cyclic: in turn, in a public order
    client_sampling: Literal["poisson", "fixed", "cyclic"] = "poisson"
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    local: TrainConfig = TrainConfig()
    personal: PersonalConfig = PersonalConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    frontier: FrontierConfig | None = None


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: no such file, broken YAML, unknown key, or a value that is not allowed.
    """
    tree: Any = {}
    where = "configuration"
    if path is not None:
        path = Path(path)
        where = f"{path} with overrides" if overrides else str(path)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)  # a line number; the line itself may hold the secret
            place = f", line {mark.line + 1}" if mark is not None else ""
            raise ConfigError(f"{path}{place}: not valid YAML; mend it there.") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(tree).__name__}.")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree, where)


def parse_config(tree: Any, where: str = "configuration") -> Config:
    """Validate nested dictionaries; raises ConfigError naming key, value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = [_explain(dict(item), where) for item in error.errors()[:3]]
    raise ConfigError("; ".join(found))  # outside of except: the chained error would show its input


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    shown = key if key.strip().startswith("privacy") else text  # the value may be the secret
    if not equals or not key.strip():
        raise ConfigError(f"override {shown!r}: expected key=value, for example privacy.epsilon=2.")
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {shown!r}: {parent!r} holds a value, not keys.")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {shown!r}: the value is not valid YAML.") from None


def _explain(item: dict[str, Any], where: str) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path) or "configuration"
    if item["type"] == "extra_forbidden":
        allowed = _keys_at(path[:-1])
        near = difflib.get_close_matches(path[-1], allowed, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}."
        return f"{where}: unknown key {key!r}; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
    if path[:1] == ["privacy"] and (len(path) == 1 or path[-1] == "secret"):
        found = ""  # never show the secret
    return f"{where}: {key}{found}: {message[0].lower()}{message[1:]}."


def _keys_at(path: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part)
        choices = [] if field is None else [field.annotation, *get_args(field.annotation)]  # a section may be optional
        model = next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def result_text(config: Config) -> str:
    """Return what the results of a run depend on, as text: the configuration without how it is run and looked at.

    Of the backbone's and the data's path the last part counts, since where a folder lies changes nothing.
    """
    name = config.model.backbone.rstrip("/").rpartition("/")[2]
    path = config.data.path and config.data.path.rstrip("/").rpartition("/")[2]
    parts = {
        "model": config.model.model_copy(update={"backbone": name}),
        "data": config.data.model_copy(update={"path": path}),
    }
    named = config.model_copy(update=parts)
    return named.model_dump_json(exclude={"name": True, "engine": True, "evaluation": True, "frontier": True,
                                          "privacy": {"secret"}})  # fmt: skip


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, without the secret."""
    tree = config.model_dump(mode="json")
    tree["privacy"].pop("secret")
    return yaml.safe_dump(tree, sort_keys=False)
