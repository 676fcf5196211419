"""fedpers itself on the same batches: the cohort engine, each client with its own noise, and the mean over clients.

    python experiments/speed/fedpers_peer.py --workload FILE --out JSON [--mode private|none] [--rounds N]

What is frozen below the lowest adapter is computed anew, in a cache of its own, and its seconds stand in the JSON (`fill`): it is
done once in a simulation. Not in here are Flower's messages and the ledger, which `whole_run.py` measures.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence

from measure import Clock, Weights, parse
from torch import Tensor
from workload import Workload, load, model_of, order

from fedpers.cohort.batching import Step
from fedpers.cohort.local_training import RecordProtection, train_phase
from fedpers.cohort.model import CohortModel
from fedpers.config import TrainConfig
from fedpers.models import assets
from fedpers.privacy.randomness import generator

import torch  # isort: skip

KEY = b"noise of a benchmark"
