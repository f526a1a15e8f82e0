"""Every file of conf/ composes, builds and runs, and says what the papers say."""

import dataclasses
import itertools
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments import build, evaluate
from experiments.program import expanded
from maml import train
from maml.tasks import images
from maml.tasks.episodes import ClassImages
from maml.tasks.splits import read_split
from tests.helpers import twins
from tests.programs import ROOT, config

CONF = ROOT / "conf"
FILES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/**/*.yaml"))
NAMES = {group: ["/".join(f.parts[1:]) for f in FILES if f.parts[0] == group] for group in {f.parts[0] for f in FILES}}
EXPERIMENTS = NAMES["experiment"]
TINY = ("trainer.steps=2", "trainer.meta_batch=2", "trainer.log_every=1", "evaluation.tasks=2")

RELIABLE = [
    *("seed", "resume", "trainer.steps", "trainer.meta_batch", "trainer.checkpoint_every", "trainer.log_every"),
    *("task.ways", "task.shots", "task.queries", "task.data_dir", "algorithm.steps", "algorithm.step_size"),
    *("optimizer.learning_rate", "evaluation.tasks", "evaluation.steps"),
]
"""Names that people's scripts may use (hydra.run.dir is tested with the programs)."""

# experiment: (ways, shots, inner steps in training, inner steps at test, step size for a sum over classes, tasks per
# meta-step): Finn et al. 2017, section 5.2 and appendix A.1.
SETTINGS = {
    "finn2017/omniglot_5way_1shot_mlp": (5, 1, 1, 3, 0.4, 32),
    "finn2017/omniglot_5way_5shot_mlp": (5, 5, 1, 3, 0.4, 32),
    "finn2017/omniglot_5way_1shot_conv": (5, 1, 1, 3, 0.4, 32),
    "finn2017/omniglot_5way_5shot_conv": (5, 5, 1, 3, 0.4, 32),
    "finn2017/omniglot_20way_1shot_conv": (20, 1, 5, 5, 0.1, 16),
    "finn2017/omniglot_20way_5shot_conv": (20, 5, 5, 5, 0.1, 16),
}

# Finn et al. 2017, Table 1: accuracy and half-width of the 95 % interval.
TABLE_1 = {
    "finn2017/omniglot_5way_1shot_mlp": (0.897, 0.011),
    "finn2017/omniglot_5way_5shot_mlp": (0.975, 0.006),
    "finn2017/omniglot_5way_1shot_conv": (0.987, 0.004),
    "finn2017/omniglot_5way_5shot_conv": (0.999, 0.001),
    "finn2017/omniglot_20way_1shot_conv": (0.958, 0.003),
    "finn2017/omniglot_20way_5shot_conv": (0.989, 0.002),
}

# The first-order ones of the same settings, as Nichol et al. 2018 quote them.
FIRST_ORDER = {
    "finn2017/omniglot_5way_1shot_conv": (0.983, 0.005),
    "finn2017/omniglot_5way_5shot_conv": (0.992, 0.002),
    "finn2017/omniglot_20way_1shot_conv": (0.894, 0.005),
    "finn2017/omniglot_20way_5shot_conv": (0.979, 0.001),
}

TASKS = {"li2017/sinusoid": 10000, "zintgraf2019/sinusoid": 1000, "nichol2018": 10000, "snell2017": 1000}
"""Of the evaluation, by experiment or paper, where they are not 600."""

# paper: figures for 5-way 1-shot, 5-way 5-shot, 20-way 1-shot, 20-way 5-shot (None: not confirmed); algorithm, steps and norm of
# the evaluation; tasks of a meta-step and meta-steps, both at 5 ways
OTHERS = {
    "nichol2018": ((0.9539, 0.9890, 0.8814, 0.9665), "reptile", 50, "joint", 5, 100000),
    "antoniou2019": ((0.9947, 0.9993, 0.9665, None), "maml_pp", 5, "batch", 8, 50000),
    "snell2017": ((0.988, 0.997, 0.960, 0.989), "protonet", 0, "batch", 1, 20000),
    "li2017": ((0.9953, 0.9993, 0.9593, 0.9897), "meta_sgd", 1, "batch", 32, 60000),
}

# Finn et al. 2017, Table 2: mean squared error after 1, 5, 10 steps, 5 shots.
TABLE_2 = {"maml": (0.67, 0.38, 0.35), "joint": (2.41, 2.23, 2.19)}


def tasks_of(name: str) -> int:
    return TASKS.get(name, TASKS.get(name.split("/")[0], 600))


@pytest.fixture(scope="module")
def drawings():
    """Noise in the shape of Omniglot: 1,623 classes of 20 drawings."""
    names = sum(read_split("finn"), ())
    counts = np.full(len(names), 20, np.int32)
    pixels = np.random.default_rng(0).integers(0, 2, (20 * len(names), 28, 28, 1), np.uint8) * 255
    return ClassImages(pixels, np.cumsum(counts, dtype=np.int32) - counts, counts), names


@pytest.fixture
def synthetic(drawings, monkeypatch):
    """Omniglot without data."""
    monkeypatch.setattr(images, "tfds_images", lambda *_, **__: drawings)


def two_steps(*overrides: str):
    """Two meta-steps and a tiny evaluation, with narrow networks. Returns metrics by step, and those of the evaluation."""
    cfg = config(*overrides, *TINY)
    OmegaConf.resolve(cfg)
    cfg = config(*overrides, *TINY, *narrow(cfg))
    learner = build.learner(cfg)
    progress = train.begin(learner.state, learner.step, learner.sampler)
    logged = {}
    progress = train.fit(progress, learner.step, learner.sampler, steps=2, log_every=1, log=logged.__setitem__)
    protocol, measure = build.evaluation(cfg, learner)
    metrics = measure(progress.state.params)
    moved = [
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (learner.state.params, progress.state.params)), strict=True)
    ]
    assert any(moved)
    assert len(metrics) % (protocol.steps + 1) == 0
    assert all(np.isfinite(value.mean) for value in metrics.values())
    return logged, metrics


def narrow(cfg) -> list[str]:
    if "filters" in cfg.model:
        return ["model.filters=4"]
    if "width" in cfg.model:
        return ["model.width=4"]
    return [f"model.hidden={[8] * len(cfg.model.hidden)}"]


# --- every file ---


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_its_interpolations_resolve(file):
    group, name = file.parts[0], "/".join(file.parts[1:])
    choice = f"{group}={name}"
    cfg = config(choice, *(["task.data_dir=DIR"] if file.name == "image_folder" else []))
    text = OmegaConf.to_yaml(cfg, resolve=True)
    assert "${" not in text
    assert not OmegaConf.missing_keys(cfg)
    with (CONF / f"{file}.yaml").open() as opened:
        keys = [k for k in yaml.safe_load(opened) if k not in ("defaults", "hydra")]
    part = cfg if group in ("experiment", "debug") else cfg[group]
    assert set(keys) <= set(part)


def test_a_table_of_a_paper_is_one_glob():
    """Hydra's own looks into one folder alone."""
    assert expanded("experiment=glob(finn2017/omniglot*)").split("=")[1].split(",") == sorted(SETTINGS)
    assert (
        expanded("experiment=glob(*/sinusoid)") == "experiment=finn2017/sinusoid,li2017/sinusoid,zintgraf2019/sinusoid"
    )
    both = "finn2017/sinusoid_oracle,finn2017/sinusoid_pretrained"
    assert expanded("experiment=glob(finn2017/sinusoid_[op]*)") == f"experiment={both}"
    everything = expanded("experiment=glob(*)").split("=")[1].split(",")
    assert set(everything) == set(EXPERIMENTS)
    assert "li2017/omniglot_5way_1shot" in expanded("experiment=glob(*omniglot*)")
    for other in ("algorithm=glob(*maml*)", "seed=1,2", "-m", "experiment=finn2017/sinusoid", "hydra.run.dir=a/b(c)"):
        assert expanded(other) == other


def test_an_algorithm_is_one_complete_file():
    for file in (CONF / "algorithm").glob("*.yaml"):
        assert "defaults" not in yaml.safe_load(file.read_text()), file.name


def test_files_lie_in_groups_that_the_defaults_name():
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    groups = {next(iter(entry)) for entry in defaults if isinstance(entry, dict)}
    ours = ("task", "model", "algorithm", "optimizer", "trainer", "logger", "evaluation", "experiment", "debug")
    assert groups == set(NAMES) == set(ours)


@pytest.mark.parametrize("name", RELIABLE)
def test_reliable_names(name):
    for cfg in (config("experiment=finn2017/omniglot_5way_1shot_mlp"), config()):
        if name not in ("task.ways", "task.data_dir") or "ways" in cfg.task:
            assert OmegaConf.select(cfg, name, default=...) is not ...


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.steps=five", "trainer.meta_batch=2.5", "trainer.log_every=[1]", "trainer.steps=null"),
        *("seed=zero", "debug_nans=perhaps", "evaluation.tasks=many"),
        *("trainer.stepz=5", "evaluation.task=5", "sead=0"),
    ],
)
def test_wrong_types_and_names_are_refused_at_the_top_level(override):
    with pytest.raises(HydraException, match=re.escape(override.split("=")[0])):
        config(override)


def test_values_reach_the_callables():
    cfg = config("algorithm.step_size=0.25", "algorithm.steps=3", "task.shots=7")
    inner = cfg.algorithm.adapt.adapt
    assert (inner.optimizer.learning_rate, inner.steps) == (0.25, 3)
    assert cfg.task.queries == 7
    assert cfg.evaluation.step_size == 0.25
    assert config("debug_nans=false").debug_nans is False
    assert config("debug_nans=true").debug_nans is True


# --- everything runs ---


WHOLE = ("finn2017/omniglot_5way_1shot_mlp", "finn2017/sinusoid", "td0_value_prediction", "markov_transformer")
"""The experiments that run by default: the others are the same programs of other sizes."""

FOMAML = ("algorithm=fomaml", "evaluation.batch=null", "evaluation.ways=${task.ways}")
"""On any experiment: a step takes the whole support set, and the head has the classes of training."""


@pytest.mark.parametrize("name", twins([n for n in EXPERIMENTS if "omniglot" not in n or n in WHOLE], EXPERIMENTS))
@pytest.mark.usefixtures("synthetic")
def test_every_experiment_is_built(name):
    """At its own sizes: what does not fit is refused here."""
    cfg = config(f"experiment={name}")
    learner = build.learner(cfg)
    protocol, _ = build.evaluation(cfg, learner)
    assert protocol.tasks == tasks_of(name)
    assert jax.tree.leaves(learner.state.params)


@pytest.mark.parametrize(
    ("name", "overrides"),
    twins(
        [(n, ()) for n in WHOLE],
        [(n, ()) for n in EXPERIMENTS] + [(n, FOMAML) for n in EXPERIMENTS if "omniglot" in n],
    ),
)
@pytest.mark.usefixtures("synthetic")
def test_every_experiment_runs(name, overrides):
    logged, metrics = two_steps(f"experiment={name}", *overrides)
    assert list(logged) == [1, 2]
    assert ("step_0/accuracy" in metrics) == ("omniglot" in name or "markov" in name)


def tfds_dir() -> str:
    """Where Omniglot is, prepared by TFDS."""
    path = Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared" / "tensorflow_datasets"))
    if not (path / "omniglot").is_dir():
        pytest.skip(f"no Omniglot in {path}: set TFDS_DATA_DIR to a folder where TFDS prepared it")
    return str(path)


@pytest.mark.parametrize("name", twins(WHOLE, [n for n in EXPERIMENTS if "omniglot" in n]))
def test_every_omniglot_experiment_runs_on_the_real_data(name, tmp_path):
    logged, _ = two_steps(f"experiment={name}", f"task.data_dir={tfds_dir()}", f"+task.cache_dir={tmp_path}")
    assert list(logged) == [1, 2]


@pytest.mark.parametrize(
    "name", twins(("mlp_batch_norm",), [n for n in NAMES["model"] if n not in ("transformer", "gaussian_policy")])
)
@pytest.mark.usefixtures("synthetic")
def test_every_model_of_images_runs_inductively(name):
    two_steps(f"model={name}", "task=omniglot", "evaluation=strict", "evaluation.queries=1", "evaluation.steps=1")


@pytest.mark.parametrize("name", twins(("joint",), ("fomaml", "joint", "maml", "maml_on_grid")))
def test_every_algorithm_runs(name):  # as a whole the family is in test_algorithms.py
    logged, metrics = two_steps(f"algorithm={name}")
    assert ("support/loss" in logged[1]) == (config(f"algorithm={name}").algorithm.steps > 0)
    assert metrics["step_1/loss"] != metrics["step_0/loss"]


# shots (4 are those of training), tasks, queries per class, norm
PROTOCOLS = {
    "finn2017": (4, 600, 4, "batch"),
    "finn2017_sinusoid": (5, 600, 5, "batch"),
    "mamlpp": (4, 600, 1, "batch"),
    "protonet": (4, 1000, 15, "batch"),
    "reptile": (4, 10000, 1, "joint"),
    "strict": (4, 6000, 15, "support"),
}


@pytest.mark.parametrize("name", NAMES["evaluation"])
@pytest.mark.usefixtures("synthetic")
def test_every_evaluation_has_the_protocol_of_its_file(name):
    cfg = config(f"evaluation={name}", "task=omniglot", "task.shots=4")
    protocol = build.build_protocol(cfg)
    assert protocol.ways == 5
    shots, tasks, queries, norm = PROTOCOLS[name]
    assert (protocol.shots, protocol.tasks, protocol.queries, protocol.norm) == (shots, tasks, queries, norm)
    assert f"rotations={'none' if name in ('mamlpp', 'reptile') else 'per_class'}" in protocol.task


@pytest.mark.parametrize("name", [name for name in NAMES["evaluation"] if name != "finn2017_sinusoid"])
@pytest.mark.usefixtures("synthetic")
def test_a_protocol_by_name_takes_the_sizes_of_the_run_and_turns_what_its_paper_turns(name):
    cfg = config("task=omniglot", "task.ways=20", "task.shots=5", "evaluation=finn2017", "evaluation.steps=2")
    protocol = build.build_protocol(evaluate.changed(cfg, [f"evaluation={name}"]))
    _, tasks, queries, norm = PROTOCOLS[name]
    assert (protocol.ways, protocol.shots, protocol.steps) == (20, 5, 2)
    assert (protocol.tasks, protocol.queries, protocol.norm) == (tasks, 5 if name == "finn2017" else queries, norm)
    assert f"rotations={'none' if name in ('mamlpp', 'reptile') else 'per_class'}" in protocol.task


@pytest.mark.parametrize(
    ("experiment", "ways", "shots"),
    [("nichol2018/omniglot_5way_1shot", 5, 1), ("snell2017/omniglot_20way_5shot", 20, 5)],
)
def test_a_protocol_by_name_takes_the_sizes_of_the_evaluation_where_training_has_others(experiment, ways, shots):
    """Reptile trains on 10 shots, prototypical networks on 60 ways."""
    cfg = config(f"experiment={experiment}")
    for name in ("strict", "finn2017", "mamlpp"):
        protocol = build.build_protocol(evaluate.changed(cfg.copy(), [f"evaluation={name}"]))
        assert (protocol.ways, protocol.shots) == (ways, shots)


def test_what_turns_no_images_has_protocols_that_turn_none():
    protocol = build.build_protocol(config("evaluation=mamlpp"))
    assert (protocol.queries, "rotations" in protocol.task) == (1, False)


# --- what the papers say ---


def default_experiment() -> str:
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return next(entry["experiment"] for entry in defaults if "experiment" in entry)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_head_comments_give_command_the_papers_number_and_ours(name):
    first, *rest = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), rest))
    assert "arXiv" in head
    command = "python -m experiments.run" + (f" experiment={name}" if name != default_experiment() else "")
    assert re.search(rf"^#   command   {command}( |$)", head, re.M)
    assert re.search(r"^#   paper  +\S", head, re.M)
    assert re.search(r"^#   ours  +\S", head, re.M)
    if name in TABLE_1:
        mean, ci95 = (f"{100 * x:.1f}" for x in TABLE_1[name])
        assert f"{mean} ± {ci95} %" in head
    if name == "finn2017/sinusoid_pretrained":
        assert " / ".join(f"{x:.2f}" for x in TABLE_2["joint"]) in head
    if name == "finn2017/sinusoid":
        assert " / ".join(f"{x:.2f}" for x in TABLE_2["maml"]) in head


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_and_figures_are_those_of_the_paper(name):
    cfg = config(f"experiment={name}")
    assert cfg.evaluation.tasks == tasks_of(name)
    assert cfg.evaluation.split == "meta_test"
    if "learning_rate" in cfg.optimizer and not OmegaConf.is_config(cfg.optimizer.learning_rate):
        assert cfg.optimizer.learning_rate == 1e-3
    if name not in SETTINGS:
        return
    ways, shots, train_steps, test_steps, step_size, meta_batch = SETTINGS[name]
    assert (cfg.task.ways, cfg.task.shots, cfg.task.queries) == (ways, shots, shots)
    assert (cfg.algorithm.steps, cfg.evaluation.steps) == (train_steps, test_steps)
    assert cfg.algorithm.step_size == pytest.approx(step_size * ways)  # our loss is a mean over the classes
    assert (cfg.trainer.steps, cfg.trainer.meta_batch) == (60000, meta_batch)
    assert (cfg.task.class_split, cfg.task.rotations, cfg.task.invert) == ("finn", "per_class", True)
    figures = OmegaConf.to_container(cfg.paper.figures)
    tables = {"maml": TABLE_1, "fomaml": FIRST_ORDER}
    last = f"meta_test/step_{test_steps}/accuracy"
    assert figures == {kind: {last: list(table[name])} for kind, table in tables.items() if name in table}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_figures_under_other_protocols_say_under_which(name):
    """Each names what it has other than the experiment, and what an evaluation can change."""
    cfg = config(f"experiment={name}")
    own = dataclasses.asdict(build.build_protocol(cfg))
    for other in cfg.paper.get("also", ()) if cfg.paper else ():
        assert set(other.protocol) <= set(own)
        assert any(own[key] != value for key, value in other.protocol.items())
        steps = other.protocol.get("steps", own["steps"])
        assert {key.split("/")[1] for of in other.figures.values() for key in of} == {f"step_{steps}"}


@pytest.mark.parametrize("paper", OTHERS)
def test_the_omniglot_tables_of_other_papers(paper):
    figures, algorithm, steps, norm, meta_batch, meta_steps = OTHERS[paper]
    for (ways, shots), figure in zip(((5, 1), (5, 5), (20, 1), (20, 5)), figures, strict=True):
        cfg = config(f"experiment={paper}/omniglot_{ways}way_{shots}shot")
        protocol = build.build_protocol(cfg)
        assert (protocol.ways, protocol.shots, protocol.steps, protocol.norm) == (ways, shots, steps, norm)
        assert cfg.algorithm.name == algorithm
        assert ways == 20 or (cfg.trainer.meta_batch, cfg.trainer.steps) == (meta_batch, meta_steps)
        assert all(getattr(protocol, name) == value for name, value in cfg.paper.protocol.items())
        found = [value[0] for value in cfg.paper.figures.get(algorithm, {}).values()]
        assert found == ([] if figure is None else [pytest.approx(figure)])
        assert all(key == f"meta_test/step_{steps}/accuracy" for key in cfg.paper.figures.get(algorithm, {}))
        if paper == "nichol2018":
            inner = (cfg.algorithm.steps, cfg.algorithm.step_size, cfg.algorithm.batch, cfg.task.shots, protocol.batch)
            assert inner == ((5, 1e-3, 10, 10, 5) if ways == 5 else (10, 5e-4, 20, 10, 10))
            assert (cfg.trainer.meta_batch, cfg.trainer.steps) == (5, 100000 if ways == 5 else 200000)
        assert ("rotations=none" in protocol.task) == (paper in ("nichol2018", "antoniou2019"))
        text = (CONF / f"experiment/{paper}/omniglot_{ways}way_{shots}shot.yaml").read_text()
        assert figure is None or f"{100 * figure:.2f}".rstrip("0") in text


def test_anil_beside_maml():
    """Raghu et al. 2020, Table 2: 20 ways, 1 and 5 shots."""
    for shots, maml, anil in ((1, 0.937, 0.962), (5, 0.964, 0.980)):
        for name in ("maml", "anil"):
            cfg = config(f"experiment=raghu2020/omniglot_20way_{shots}shot_{name}")
            assert (cfg.algorithm.name, cfg.task.ways, cfg.task.shots) == (name, 20, shots)
            assert [cfg.paper.figures[a]["meta_test/step_5/accuracy"][0] for a in ("maml", "anil")] == [maml, anil]


def test_the_main_job_is_the_papers_sinusoid():
    cfg = config()
    assert (cfg.trainer.steps, cfg.trainer.meta_batch, cfg.evaluation.steps) == (70000, 25, 10)
    assert (cfg.algorithm.steps, cfg.algorithm.step_size, cfg.optimizer.learning_rate) == (1, 0.001, 1e-3)
    assert (cfg.task.shots, cfg.evaluation.shots, cfg.evaluation.tasks) == (5, 5, 600)
    task = cfg.task
    assert (task.amplitude, task.inputs) == ([0.1, 5.0], [-5.0, 5.0])
    assert task.phase == pytest.approx([0, np.pi])
    assert cfg.model.hidden == [40, 40]


@pytest.mark.parametrize(
    ("overrides", "algorithm"), [((), "maml"), (("experiment=finn2017/sinusoid_pretrained",), "joint")]
)
def test_figures_of_the_sinusoids(overrides, algorithm):
    cfg = config(*overrides)
    assert cfg.algorithm.name == algorithm
    values = zip((1, 5, 10), TABLE_2[algorithm], strict=True)
    figures = {f"meta_test/step_{step}/loss": [value, None] for step, value in values}
    assert OmegaConf.to_container(cfg.paper.figures) == {algorithm: figures}


def test_the_baselines_train_without_an_inner_loop():
    for name in ("sinusoid_pretrained", "sinusoid_oracle"):
        cfg = config(f"experiment=finn2017/{name}")
        assert cfg.algorithm.steps == 0
        assert cfg.task.oracle == (name == "sinusoid_oracle")
    assert config("experiment=finn2017/sinusoid_oracle").paper is None  # plotted only
