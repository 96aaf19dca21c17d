"""
Forecast against training
=========================

*One measurement of the gradient noise says where the charges go. Do they?*
"""

# %%
# A linear network of two layers on data with noisy labels, trained by SGD until the loss hardly moves. What then moves
# is the split of the same function among the two layers.
import torch

import noetherflow as nf
from noetherflow.workloads import linear_factorisation

work = linear_factorisation()
model, sgd = work.model, nf.SGDConfig(lr=0.02, batch_size=8)
x, y = (torch.cat(parts) for parts in zip(*work.batches, strict=True))
optimizer = torch.optim.SGD(model.parameters(), lr=sgd.lr)
torch.manual_seed(0)


def train(steps):
    for _ in range(steps):
        chosen = torch.randint(len(x), (sgd.batch_size,))
        optimizer.zero_grad()
        work.loss_fn(model, (x[chosen], y[chosen])).mean().backward()
        optimizer.step()


train(6000)

# %%
# Move it along its symmetry: the first layer times 1.5, the second divided by 1.5. The function, and so the loss, is
# the same; the charge is not.
(symmetry,) = nf.find_symmetries(model, work.example_inputs)


def charge():
    """The trace of the charge: what comes in less what goes out."""
    return symmetry.charge(nf.tensors_of(model)).diagonal(dim1=-2, dim2=-1).sum().item()


before = charge()
symmetry.act_(nf.tensors_of(model), 1.5 * symmetry.identity())
print(f"charge before {before:.3f}, after {charge():.3f}")

# %%
# Measure once, and forecast the next two thousand steps.
analysis = nf.analyze(model, work.loss_fn, [(x, y)], sgd, work.example_inputs, curvature=False)
forecast = analysis.flow.forecast(range(0, 2001, 200))
print(forecast)

# %%
# Now train on, with a ledger that books every change of every charge.
with nf.Ledger(model, optimizer, analysis.symmetries, detail="symmetry", capacity=2100) as ledger:
    train(2001)
comparison = forecast.compare(ledger)
print(comparison)

# %%
# Lines: the forecast from before the training. Dots: the training.
figure, axes = comparison.plot()

# %%
# What moved the charge? Noise, all of it; an exact symmetry leaves the gradient itself no part.
figure, axes = ledger.plot()
