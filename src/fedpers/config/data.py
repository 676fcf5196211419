"""Whose records, and what is learnt from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedpers.config.base import Positive, Section


class ColumnsConfig(Section):
    """Which columns of the user's own files hold what."""

    user: str | None = "user"  # null: there are no users, and data.partition makes them up
    input: str | None = "input"  # null: there is none, such as where a language model learns texts as they are
    target: str = "target"
    time: str | None = None  # when a record was made; without it the order in the files counts
    id: str | None = None  # distinct within a user; by default a hash of the row
    conversation: str | None = None  # what must not be split between training and test, across users too


def _labels(value: Any) -> Any:
    """Take whole numbers as texts; YAML's yes and no are truth values, and one text is no list."""
    if isinstance(value, str):
        raise ValueError("expected a list, as labels: [good, bad]")
    if isinstance(value, list | tuple) and any(isinstance(one, bool | float) for one in value):
        raise ValueError("quote labels that YAML takes for something else: labels: ['yes', 'no']")
    return [str(one) if isinstance(one, int) else one for one in value] if isinstance(value, list | tuple) else value


Labels = Annotated[tuple[str, ...], BeforeValidator(_labels)]


class PartitionConfig(Section):
    """How records that have no user are dealt to made-up ones; all of it is public."""

    by: Literal["dirichlet", "pathological", "iid"]
    users: int = Field(ge=1, le=100_000)  # made up, development users among them
    alpha: float = Field(0.3, ge=0.01, le=1e6)  # dirichlet: small, each label with few users; large, as with iid
    classes: int = Field(2, ge=1)  # pathological: a user has at most so many labels
    labels: Labels = ()  # pathological: the public list of labels
    # its own, since with the run's seed a record that one run tunes on would be a member's in another
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _dealt(self) -> PartitionConfig:
        if self.by == "pathological":
            if len(set(self.labels)) != len(self.labels) or not self.classes <= len(self.labels):
                raise ValueError(
                    f"labels must list {self.classes} labels (classes) or more, each once; they are public"
                )
            if self.users * self.classes < len(self.labels):
                raise ValueError(
                    f"users={self.users} with classes={self.classes} labels each leave some of the {len(self.labels)} "
                    "labels to nobody; raise users or classes"
                )
        return self


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
    held_out: int = Field(0, ge=0)  # so many people with enough records or more are no users, for `fedpers cold-start`
    drift: float | None = Field(None, gt=0, lt=1)  # after this share of a history the records are another person's
    min_train: int = Field(15, ge=1)
    min_test: int = Field(5, ge=1)
    max_train: int = Field(60, ge=1)  # records per user; bounds what one heavy user costs and shapes
    max_test: int = Field(40, ge=1)
    max_tokens: int = Field(48, ge=4, le=512)
    path: str | None = None  # files: a file, folder, pattern or hub:owner/name; (long)lamp: its files
    columns: ColumnsConfig = ColumnsConfig()  # files
    partition: PartitionConfig | None = None  # files: made-up users, where columns.user is null
    test_share: float = Field(0.3, gt=0, lt=1)  # files: the last share of each user's records is for testing
    skip_bad: bool = False  # files, (long)lamp: leave unusable records out and count them, not stop at the first
    pool: bool = False  # files: the people whose id says "pool" are no members; their targets are the public texts
    lamp: LampConfig = LampConfig()
    lazy: bool = False  # make a user's records when they are first needed; for very many made-up people

    @model_validator(mode="after")
    def _caps(self) -> DataConfig:
        if self.lazy and self.drift is not None:
            raise ValueError("lazy=true with drift: donors are chosen among all people; leave one of them out")
        for part in ("train", "test"):
            low, high = getattr(self, f"min_{part}"), getattr(self, f"max_{part}")
            if low > high:
                raise ValueError(f"min_{part}={low} exceeds max_{part}={high}, so no user could take part")
        return self

    @model_validator(mode="after")
    def _users(self) -> DataConfig:
        if (self.columns.user is None) != (self.partition is not None):
            raise ValueError(
                "columns.user=null and partition go together: records either name their users in a column, or are "
                "dealt to made-up ones, as with partition={by: iid, users: 20}"
            )
        return self


class TaskConfig(Section):
    """What is learnt."""

    name: str = "reply-ranking"
    candidates: int = Field(10, ge=2, le=100)  # the true reply and so many minus one others
    scale: Positive | None = None  # what a head multiplies its products by; by default the task's own number
    low: float = 1.0  # rating: the public scale
    high: float = 5.0
    labels: Labels = ()  # classification: the public list of labels
