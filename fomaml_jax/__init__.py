"""First-order meta-learning in JAX."""

from fomaml_jax import batch_statistics, datasets, models, rates, schedules, shifts, tasks, uneven
from fomaml_jax.adaptation import adapt
from fomaml_jax.adapted_files import load_adapted, save_adapted
from fomaml_jax.change_detection import Change, ChangeDetector, cusum
from fomaml_jax.checkpoints import CheckpointError
from fomaml_jax.classifiers import Classifier, load_classifier
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.evaluation import Evaluation, evaluate, evaluate_on, paired_difference
from fomaml_jax.learned_rates import learned_rates, meta_sgd
from fomaml_jax.learner import (
    MetaLearner,
    MetaState,
    StepInfo,
    meta_learner,
    scheduled_learner,
    with_state,
)
from fomaml_jax.meta_gradients import fomaml, maml, reptile
from fomaml_jax.online_learner import Arrival, OnlineLearner, OnlineState, online
from fomaml_jax.order import Diagnosis, Order, check_order, diagnose
from fomaml_jax.parallel import over_tasks
from fomaml_jax.precision import compute_in
from fomaml_jax.recognition import AdaptedClassifier, adapt_classifier
from fomaml_jax.regressors import Regressor, load_regressor
from fomaml_jax.serial import serial_reptile
from fomaml_jax.starts import prototype_head, starting_from
from fomaml_jax.training import DivergedError, Trained, train
from fomaml_jax.tuning import Plan, tune
from fomaml_jax.types import (
    AdaptInfo,
    Batch,
    KeyedTask,
    LossFn,
    MetaGradient,
    Params,
    PerStep,
    Task,
    TaskInfo,
    WithRates,
    WithState,
)

__all__ = [
    "AdaptInfo",
    "AdaptedClassifier",
    "Arrival",
    "Batch",
    "Change",
    "ChangeDetector",
    "CheckpointError",
    "Classifier",
    "Diagnosis",
    "DivergedError",
    "Evaluation",
    "KeyedTask",
    "LossFn",
    "MetaGradient",
    "MetaLearner",
    "MetaState",
    "OnlineLearner",
    "OnlineState",
    "Order",
    "Params",
    "PerStep",
    "Plan",
    "Regressor",
    "StepInfo",
    "Task",
    "TaskInfo",
    "Trained",
    "WithRates",
    "WithState",
    "adapt",
    "adapt_classifier",
    "batch_statistics",
    "check_order",
    "compute_in",
    "cusum",
    "datasets",
    "diagnose",
    "evaluate",
    "evaluate_on",
    "fomaml",
    "learned_rates",
    "load_adapted",
    "load_classifier",
    "load_regressor",
    "maml",
    "matmul_convolutions",
    "meta_learner",
    "meta_sgd",
    "models",
    "online",
    "over_tasks",
    "paired_difference",
    "prototype_head",
    "rates",
    "reptile",
    "save_adapted",
    "scheduled_learner",
    "schedules",
    "serial_reptile",
    "shifts",
    "starting_from",
    "tasks",
    "train",
    "tune",
    "uneven",
    "with_state",
]
