"""One frozen network, and for every task small tensors that make its weights: modulation, masks, low rank, copies.

```python
net = Modulated(backbone, Modulation(4, 4))             # trainable: a 16th of the weights, and a head
result = run(stream, net, PerTask(), None, Training(epochs=10, lr=1e-2, optimizer="adamw"))
state = result.learner.tasks[2]                         # what the third task adds
save("greek.safetensors", net, state, name="greek")     # a small file
network("greek.safetensors", backbone)                  # an ordinary network, as fast as the backbone
```
"""

from clkit.modulation.modulated import Modulated, TaskState, listed, load, modulated, network, save
from clkit.modulation.rules import RULES, LowRank, Mask, Modulation, Own, Rule, interpolation_matrix
