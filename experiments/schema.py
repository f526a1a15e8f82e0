"""Names and types of the config's top level and of its closed groups, for Hydra to check."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Trainer:
    steps: int = MISSING
    meta_batch: int = MISSING
    task_chunk: Any = MISSING
    devices: Any = 1
    memory_gb: float | None = None
    log_every: int = MISSING
    checkpoint_every: int = MISSING
    keep_checkpoints: int = MISSING
    validate_every: int = MISSING
    validation_tasks: int = MISSING


@dataclass
class Evaluation:
    split: str = MISSING
    tasks: int = MISSING
    ways: int | None = MISSING
    shots: int = MISSING
    queries: int = MISSING
    steps: int = MISSING
    norm: str = MISSING
    seed: int = MISSING
    step_size: Any = MISSING  # a number, or a list of one for each inner step
    prototypes: str | None = None
    rotations: str | None = None  # of the task; null: those of training
    least_ways: int | None = None  # of tasks that vary; 0: none vary; null: as in training
    batch: int | None = None  # of the algorithm's minibatches; null: that of training
    after: Any = None  # the inner steps after which the query set is measured, as [0,50]; null: all. Changes no number


@dataclass
class PerExample:
    """Per-example and per-task meta-gradients, logged during training (`experiments.diagnostics`)."""

    every: int = MISSING
    tasks: int = MISSING
    outliers: int = MISSING


@dataclass
class Curvature:
    """Curvature along the inner loop, logged during training (`experiments.curvature`)."""

    every: int = MISSING
    tasks: int = MISSING
    lanczos: int = MISSING


@dataclass
class Learned:
    """What the inner loop learns beside the model, logged during training (`experiments.diagnostics`)."""

    every: int = MISSING


@dataclass
class Diagnostics:
    per_example: PerExample = field(default_factory=PerExample)
    curvature: Curvature = field(default_factory=Curvature)
    learned: Learned = field(default_factory=Learned)


@dataclass
class Gradcheck:
    tasks: int = MISSING
    directions: int = MISSING
    epsilon: float = MISSING
    tolerance: float = MISSING


@dataclass
class Quantization:
    bits: int = MISSING
    activations: int | None = MISSING
    scale: str = MISSING
    layers: str = MISSING


@dataclass
class Config:
    """Names and types of the top level; the open groups hold callables and their arguments."""

    task: Any = MISSING
    model: Any = MISSING
    algorithm: Any = MISSING
    optimizer: Any = MISSING
    trainer: Trainer = field(default_factory=Trainer)
    logger: Any = MISSING
    evaluation: Evaluation = field(default_factory=Evaluation)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    gradcheck: Gradcheck = field(default_factory=Gradcheck)
    quantization: Quantization = field(default_factory=Quantization)
    seed: int = 0
    resume: str | None = None
    plan: bool = False
    paper: Any = None
    debug_nans: bool = False


ConfigStore.instance().store(name="schema", node=Config)
