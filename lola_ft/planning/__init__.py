"""Planning: predict a run's memory and file sizes from the base's config and plain settings. Reads no weights.

Weights, adapter, gradients, optimiser state and file sizes are counted exactly. Activations are the sum of the tensors
that each part of a layer saves for backward. Work space and the CUDA context are estimates.
"""

from lola_ft.planning.fit import Change, first_fit
from lola_ft.planning.job import Job
from lola_ft.planning.predict import Prediction, predict
from lola_ft.planning.sizes import parse_size, show_size

__all__ = ["Change", "Job", "Prediction", "first_fit", "parse_size", "predict", "show_size"]
