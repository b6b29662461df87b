"""What networks represent: features at any layer, how alike two networks' are, how they change when weights merge.

Everything here is pure: models, weights and inputs are left as they were, and results are numbers and tables. A model
is a network, or one linearised (`tangent.Linearized`), whose layers are read at their linearised values. Inputs are
prepared tensors on the model's device.
"""

from clkit.models import activations, features, with_weights
from clkit.representation.similarity import Embedding, embed
from clkit.representation.similarity import cka, cka_by_layer, cka_in_batches, distances, hsic, mismatch
from clkit.representation.units import collapse, correlations, matched, variance_ratio
