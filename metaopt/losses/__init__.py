"""What a stage minimises, who writes its data, what the meta-parameters minimise; helpers for losses of one's own."""

from metaopt.core.contracts import InnerLoss as InnerLoss
from metaopt.core.contracts import Upstream as Upstream
from metaopt.core.contracts import require_scalar as require_scalar
from metaopt.losses.distillation import Distillation as Distillation
from metaopt.losses.distillation import FromUpstream as FromUpstream
from metaopt.losses.distillation import HardLabels as HardLabels
from metaopt.losses.distillation import HiddenStates as HiddenStates
from metaopt.losses.distillation import find_upstream as find_upstream
from metaopt.losses.distillation import soft_label_loss as soft_label_loss
from metaopt.losses.logits import IGNORED as IGNORED
from metaopt.losses.logits import NOT_FOR_MODELS as NOT_FOR_MODELS
from metaopt.losses.logits import Batch as Batch
from metaopt.losses.logits import aligned_labels as aligned_labels
from metaopt.losses.logits import counted as counted
from metaopt.losses.logits import cross_entropies as cross_entropies
from metaopt.losses.logits import cross_entropy_per_example as cross_entropy_per_example
from metaopt.losses.logits import label_losses as label_losses
from metaopt.losses.logits import logits_of as logits_of
from metaopt.losses.logits import mean_over_positions as mean_over_positions
from metaopt.losses.logits import model_inputs as model_inputs
from metaopt.losses.logits import num_classes as num_classes
from metaopt.losses.logits import weighted_mean as weighted_mean
from metaopt.losses.supervised import CrossEntropy as CrossEntropy
from metaopt.losses.supervised import LabelSmoothing as LabelSmoothing
from metaopt.losses.supervised import WeightedLoss as WeightedLoss
