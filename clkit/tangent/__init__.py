"""Linearised models: a network replaced by its first-order expansion in the weights around one frozen point.

f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0), with J the Jacobian of the outputs in the weights.
f_lin is affine in theta: an average of linearised models' weights is the average of their outputs.
"""

from clkit.tangent.linearized import Linearized, layers, value
