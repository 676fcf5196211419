"""What names a run, so that a secret makes the same noise for the same run alone."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from fedpers.cohort.model import CohortModel
from fedpers.config import result_text
from fedpers.experiment import Experiment
from fedpers.registry import source_of


def identity(experiment: Experiment, model: CohortModel) -> str:
    """Name all that a run's releases depend on besides the secret: configuration, table, people, weights, version.

    The run's keys are made from it, so that a secret which is given twice makes the same noise for the same run alone.
    """
    examples, lazy = experiment.examples, experiment.federation.lazy
    digest = hashlib.sha256()
    # What makes the records stands for those that are not made; some are, and tell how they are read.
    users = (len(examples.users), lazy) if lazy else examples.users
    for part in (users, examples.ids, examples.inputs, examples.texts):
        digest.update(repr(part).encode())
    digest.update(examples.candidates.tobytes() + examples.targets.tobytes())
    digest.update(repr(examples.continuations).encode())
    read = model.read(examples) if lazy else (model.inputs, model.texts)
    for tokens in read:  # what a tokenizer makes of texts hangs on more than its vocabulary
        digest.update(repr((tokens.starts, [ids.tolist() for ids in tokens.ids])).encode())
    for kind in (experiment.plan.method, type(experiment.task)):
        digest.update(source_of(kind).encode())
    for rows in (examples.train[user] for user in examples.people):
        digest.update(len(rows).to_bytes(8, "little") + rows.tobytes())
    plan = experiment.plan
    phases = [str(phase) for part in (plan.round, plan.finish) for phase in part]
    scopes = sorted((group, str(scope)) for group, scope in plan.scopes.items())
    table = [scopes, len(plan.round), phases, plan.head, sorted(plan.options.items()), plan.method.functions()]
    # Whether anything adapts, if only the baseline, decides in which precision contexts are computed.
    parts = [result_text(experiment.config), experiment.adapts, table, digest.hexdigest(), model.fingerprint]
    # How the work is cut shows in rounded results, and the device in all, by more than two threads' float tolerance.
    if experiment.config.engine.rounded or experiment.config.engine.device != "cpu":
        parts.append(experiment.config.engine.model_dump_json())
    return json.dumps([*parts, version("fedpers")])
