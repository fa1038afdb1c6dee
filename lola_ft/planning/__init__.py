"""Planning: what a run will need, from the base's config and plain settings; no weights are read.

Weights, adapter, gradients, optimiser state and file sizes are counted exactly; activations follow what each part of a
layer saves for backward; work space and the CUDA context are estimates.
"""

from lola_ft.planning.fit import Change, first_fit
from lola_ft.planning.job import Job
from lola_ft.planning.predict import Prediction, predict
from lola_ft.planning.sizes import parse_size, show_size

__all__ = ["Change", "Job", "Prediction", "first_fit", "parse_size", "predict", "show_size"]
