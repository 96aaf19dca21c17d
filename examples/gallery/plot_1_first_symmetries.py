"""
First symmetries
================

*What can be changed in this network without changing what it computes?*
"""

# %%
# A network with everything that usually meets: ReLU, a normalisation, and two linear maps in a row.
import torch
from torch import nn

import noetherflow as nf

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6), nn.Linear(6, 3)
).double()
x = torch.randn(64, 8).double()
syms = nf.find_symmetries(model, x[:2])
print(syms)

# %%
# The map has a row per layer and a column per symmetry. Filled: scaled with the symmetry; open: scaled against it. The
# first weight stands alone: a normalisation follows, so its size does not matter, and nothing holds it back.
figure, axes = syms.plot()

# %%
# Every one is checked with random group elements, outputs and per-sample gradients.
print(nf.certify(model, syms, x[:8]))

# %%
# Try it by hand: multiply the weights into the ReLU units by random numbers, and divide those behind.
symmetry = next(s for s in syms if s.family == "rescaling")
before = model(x)
symmetry.act_(nf.tensors_of(model), symmetry.random_element(spread=1.0))
print(symmetry)
print("largest change of any output:", float((model(x) - before).detach().abs().max()))

# %%
# And why does a parameter lack one? Ask.
softplus = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
print(nf.explain(softplus, torch.randn(2, 3), "0.weight"))
