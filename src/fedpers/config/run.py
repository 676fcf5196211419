"""The sections of a run, and the whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedpers.config.base import FAMILIES, Groups, Positive, Rate, Section
from fedpers.config.data import DataConfig, TaskConfig
from fedpers.config.privacy import Epsilon, PrivacyConfig


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
    options: dict[str, float | int] = Field(default_factory=dict)


class EngineConfig(Section):
    """How the work is cut and computed. In fp32 none of it changes results beyond float tolerance; `precision` and
    `prefix` round to 16 bits, and then the cut shows, too.
    """

    cohort_size: int = Field(64, ge=1)  # clients that train together
    token_budget: int = Field(2048, ge=512)  # padded tokens of one pass
    tune: bool = False  # choose these two by measurement before the first round; kept for when the run is resumed
    threads: int = Field(2, ge=1)  # passes that go on beside each other, on a CPU
    device: str = "cpu"  # where the model computes: cpu, cuda, cuda:1, mps; state, noise and messages stay on the CPU
    precision: Literal["fp32", "bf16"] = "fp32"  # of products with frozen weights in the adapted blocks
    prefix: Literal["fp32", "fp16"] = "fp32"  # how the hidden states below the adapted blocks are kept

    @property
    def rounded(self) -> bool:
        """Whether anything is rounded to 16 bits."""
        return self.precision == "bf16" or self.prefix == "fp16"


class EvaluationConfig(Section):
    """What is measured on the way."""

    every: int = Field(1, ge=0)  # rounds between evaluations of the shared model; 0: never
    local_only: bool = True  # also train one model per user without federation
    users: int | None = Field(None, ge=2)  # how many users are measured and train at home; by default all


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
    options: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict
    )  # the method's own numbers, by name
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
