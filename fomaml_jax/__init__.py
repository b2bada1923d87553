"""First-order meta-learning in JAX."""

from fomaml_jax import datasets, models, tasks
from fomaml_jax.adaptation import adapt
from fomaml_jax.convolutions import matmul_convolutions
from fomaml_jax.evaluation import Evaluation, evaluate
from fomaml_jax.learner import MetaLearner, MetaState, StepInfo, meta_learner
from fomaml_jax.meta_gradients import fomaml, maml, reptile
from fomaml_jax.parallel import over_tasks
from fomaml_jax.precision import compute_in
from fomaml_jax.tuning import Plan, tune
from fomaml_jax.types import AdaptInfo, Batch, LossFn, MetaGradient, Params, Task, TaskInfo

__all__ = [
    "AdaptInfo",
    "Batch",
    "Evaluation",
    "LossFn",
    "MetaGradient",
    "MetaLearner",
    "MetaState",
    "Params",
    "Plan",
    "StepInfo",
    "Task",
    "TaskInfo",
    "adapt",
    "compute_in",
    "datasets",
    "evaluate",
    "fomaml",
    "maml",
    "matmul_convolutions",
    "meta_learner",
    "models",
    "over_tasks",
    "reptile",
    "tasks",
    "tune",
]
