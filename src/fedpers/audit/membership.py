"""Membership inference on trained models: was this record used for training?

Small shadow federations of one configuration are trained on the production path. In each, every record is in or out by
a fair coin of its own, so that each federation can be attacked with what the others show. Attacked are the released
shared model and, as if it had leaked, the personal model of a record's owner.

What is a bound here and what is not. Records that one model was trained on are not independent samples, so attack
rates, and the two-sample epsilon made of them (`heuristic_epsilon`), describe success and refute nothing. The inclusion
coins are independent, and that is what the one-run audit needs (Steinke, Nasr, Jagielski: Privacy Auditing with One (1)
Training Run, NeurIPS 2023). Several federations with coins and noise of their own are one mechanism with more coins,
each of which changes one federation alone, so they may be pooled. Then no guess may read a coin except through the
models. The loss attack reads none. The likelihood ratio reads the coins of its shadows, so for the bound the first half
of the federations are shadows and the second half are guessed; for the rates each is attacked with all the others.

The bound concerns single records. Where whole users are protected it is held against what that implies for a record:
without one of its records a user does not vanish, but contributes something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fedpers.audit.bounds import (
    Finding,
    attack_rates,
    corrected,
    guess,
    one_run_bound,
    one_run_ceiling,
    two_sample_bound,
    verdict,
)
from fedpers.audit.membership_scores import (
    Mask,
    Scores,
    advantage_at_training_loss,
    confidence,
    leave_one_out,
    likelihood_ratio,
)
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, parse_config, result_text
from fedpers.errors import ConfigError
from fedpers.experiment import Experiment, Reuse, build_model, prepare
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import derive, run_keys, seed_key, uniforms
from fedpers.privacy.spending import record_level, spent
from fedpers.reporting import Reporter
from fedpers.rounds import federate
from fedpers.run_directory import RunDirectory
from fedpers.tasks.base import Examples, Rows

SHARED_MODEL, PERSONAL_MODEL = "shared model", "personal model"
LOSS, LIRA = "membership: loss threshold", "membership: LiRA"
CONFIDENCE = 0.95  # of all bounds of one audit together


@dataclass(frozen=True)
class Shadow:
    """One trained federation, seen by its attacker.

    Attributes:
        included: (targets,) whether each record was in its owner's training data.
        losses: by what is attacked, (targets,) the loss of each record under the shared model or its owner's own.
        claimed: by what is attacked, the epsilon that this federation's ledger promises a single record.
    """

    included: Mask
    losses: Mapping[str, Scores]
    claimed: Mapping[str, float]


def membership(
    config: Config,
    *,
    users: int = 30,
    shadows: int = 16,
    records: int = 24,
    reporter: Reporter | None = None,
    reuse: Reuse | None = None,
) -> list[Finding]:
    """Train shadow federations and attack each with the help of the others.

    Args:
        config: the configuration to audit; its noise stays on. Its secret is not used: shadows have noise of their own.
        users: at most so many users in each shadow; its guarantee is calibrated for them.
        shadows: number of federations, 4 or more.
        records: at most so many target records of each user, of which every shadow trains on about half.
        reporter: whom to tell about progress.
        reuse: frozen features to share with other runs in this process.

    Returns:
        Findings of kind "attack", two (loss threshold and LiRA) for each kind of model that the method trains.

    Raises:
        ConfigError: too few shadows.
        FedpersError: whatever a run of this configuration would raise before it trains.
    """
    if shadows < 4:
        raise ConfigError(f"membership audit: shadows={shadows} leaves nothing to compare with; use 4 or more.")
    reporter = reporter or Reporter()
    experiment = prepare(smaller(config, users, records), reuse)
    model = build_model(experiment, reporter, reuse)
    reporter.stage("shadow federations", 0, shadows)
    trained = []
    for number in range(shadows):
        trained.append(train_shadow(experiment, model, number))
        reporter.stage("shadow federations", number + 1, shadows)
    return findings(trained, experiment.config.privacy.delta, len(experiment.examples.users))


def smaller(config: Config, users: int, records: int) -> Config:
    """Return the configuration with at most so many users and training records of each, nothing measured on the way."""
    tree = config.model_dump(mode="json")
    data = config.data
    tree["data"] |= {
        "users": min(users, data.users or users),
        "max_train": min(records, data.max_train),
        "min_train": min(records, data.min_train),
        "max_test": data.min_test,
    }
    tree["evaluation"] |= {"every": 0, "local_only": False}
    tree["frontier"] = None
    return parse_config(tree, "membership audit")


def coins(key: bytes, shadow: int, ids: Sequence[str]) -> Mask:
    """Return which records are in, (records,): a fair coin for each, by shadow and record id alone."""
    return np.asarray(uniforms(key, ("coins", shadow), ids)[:, 0] < 0.5)


def restrict(examples: Examples, included: Mask) -> Examples:
    """Return the examples whose training rows are the included ones; `included` follows the users' rows."""
    edges = np.cumsum([len(rows) for rows in examples.train])[:-1]
    kept = tuple(rows[part] for rows, part in zip(examples.train, np.split(included, edges), strict=True))
    return replace(examples, train=kept)


def train_shadow(experiment: Experiment, model: CohortModel, number: int) -> Shadow:
    """Train one federation on the records that its coins choose, as a run does, and score all target records.

    Args:
        experiment: people, plan and guarantee; all training rows are targets.
        model: the model over all of its rows; parameters are loaded into it.
        number: which shadow; coins, noise and sampling are drawn by it from the public seed.
    """
    examples, plan = experiment.examples, experiment.plan
    key = derive(seed_key(experiment.config.seed), "membership")
    included = coins(key, number, [examples.ids[row] for row in np.concatenate(examples.train)])
    secret = derive(key, "noise", number).hex()
    privacy = experiment.config.privacy.model_copy(update={"secret": secret})
    config = experiment.config.model_copy(update={"privacy": privacy})
    inside = replace(experiment, config=config, examples=restrict(examples, included))
    with TemporaryDirectory(prefix="fedpers-shadow-") as folder:
        directory = RunDirectory.create(Path(folder) / "run", config)
        initial = layout(experiment.config, plan, model).kept()
        store = PersonalStore(directory.private / "rounds", len(examples.users), initial)
        server_key, clients_key = run_keys(directory.secret(), result_text(config))
        clients = Clients(config, plan, experiment.guarantee, model, store, clients_key)
        clients.examples = inside.examples
        shared, ledger, _ = federate(inside, clients, directory, server_key, Reporter())
        losses: dict[str, Scores] = {}
        if shared:
            common = model.broadcast(1, {name: torch.from_numpy(array) for name, array in shared.items()})
            losses[SHARED_MODEL] = record_losses(model, common, [np.concatenate(examples.train)])
        if plan.personal:
            losses[PERSONAL_MODEL] = np.concatenate(
                [
                    record_losses(model, parameters, [examples.train[user] for user in cohort])
                    for cohort, parameters in clients.finish(range(len(examples.users)), shared, clients.store)
                ]
            )
        promised = record_epsilon(ledger)
        personal = promised if ledger.opening.personal_covered else math.inf
        return Shadow(included, losses, {SHARED_MODEL: promised, PERSONAL_MODEL: personal})


@torch.no_grad()
def record_losses(model: CohortModel, parameters: Parameters, rows: Sequence[Rows]) -> Scores:
    """Return the loss, in double precision, of every record in rows[i] under the i-th model of `parameters`."""
    model.load(parameters)
    flat = np.concatenate(rows)
    owners = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    scores = model.scores(model.all_contexts(flat, owners), flat, torch.from_numpy(owners))
    return np.asarray(model.task.loss(scores.cpu().double(), model.targets(flat).cpu()).numpy())


def record_epsilon(ledger: Ledger) -> float:
    """Return the epsilon, at the ledger's delta, of adding or removing one record; infinite where none is computed."""
    if ledger.opening.unit != "user":
        return spent(ledger)
    implied = record_level(ledger.opening, ledger.releases)
    return math.inf if implied is None else implied


def findings(trained: Sequence[Shadow], delta: float, users: int) -> list[Finding]:
    """Attack every shadow, and bound epsilon from below by the coins that were guessed."""
    included = np.stack([shadow.included for shadow in trained])
    attacked = tuple(trained[0].losses)
    level = corrected(CONFIDENCE, 2 * len(attacked))  # two attacks on each model are tried
    half = len(trained) // 2
    found = []
    for what in attacked:
        losses = np.stack([shadow.losses[what] for shadow in trained])
        scale = confidence(losses)
        claimed = max(shadow.claimed[what] for shadow in trained)
        fresh = likelihood_ratio(scale[half:], scale[:half], included[:half])
        threshold = {"advantage_at_training_loss": advantage_at_training_loss(losses, included)}
        for name, scores, canaries, coin, more in (
            (LOSS, -losses, -losses, included, threshold),
            (LIRA, leave_one_out(scale, included), fresh, included[half:], {}),
        ):
            guesses = 2 * (canaries.size // 10)  # fixed beforehand: a fifth, as many in as out
            correct = guess(canaries.ravel(), coin.ravel(), guesses)
            lower = one_run_bound(correct, guesses, canaries.size, delta, level)
            ceiling = one_run_ceiling(guesses, canaries.size, delta, level)
            numbers = {
                **_success(scores, included, delta, level),
                **more,
                "canaries": float(canaries.size),
                "guesses": float(guesses),
                "correct": float(correct),
                "shadows": float(len(trained)),
                "users": float(users),
            }
            found.append(
                Finding(
                    name=name,
                    what=what,
                    unit="record",
                    claimed=claimed,
                    delta=delta,
                    empirical=lower,
                    ceiling=ceiling,
                    kind="attack",
                    verdict=verdict(claimed, lower, ceiling),
                    detail=(
                        f"{len(trained)} federations of {users} users and {included.shape[1]} records, each in by a "
                        f"fair coin; the bound is the one-run audit of {canaries.size} coins, {correct} of {guesses} "
                        f"guesses right, and holds at {CONFIDENCE:.0%} with the {2 * len(attacked) - 1} others; "
                        "rates and heuristic_epsilon (records of one model taken for independent) bound nothing."
                    ),
                    numbers=numbers,
                )
            )
    return found


def _success(scores: Scores, included: Mask, delta: float, level: float) -> dict[str, float]:
    """Rates over all records in all shadows, the spread of AUC between shadows, and the heuristic epsilon."""
    single = [attack_rates(one, held)["auc"] for one, held in zip(scores, included, strict=True)]
    return {
        **attack_rates(scores.ravel(), included.ravel()),
        "auc_spread": float(np.std(single, ddof=1)),
        "heuristic_epsilon": two_sample_bound(scores[included], scores[~included], delta, level),
    }
