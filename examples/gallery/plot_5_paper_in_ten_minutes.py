"""
The paper in ten minutes
========================

*Gradient flow conserves; noise does not. Where does SGD go that gradient descent cannot?*
"""

# %%
# Two numbers, one product: the model is ``u * w``, and only the product matters. Multiply ``u`` by ten and divide ``w``
# by ten: the same function. Gradient flow conserves the charge ``u^2 - w^2`` of this symmetry.
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

rng = np.random.default_rng(0)
eta, steps = 0.03, 8000


def run(u, w, batch, noise=1.0):
    """Fit y = x + noise with u * w * x by SGD; a batch of None is the exact gradient."""
    course = np.empty((steps, 2))
    for k in range(steps):
        if batch is None:
            g = u * w - 1
        else:
            x, e = rng.choice([-1.0, 1.0], batch), rng.normal(size=batch)
            g = np.mean((u * w * x - x - noise * e) * x)
        u, w = u - eta * g * w, w - eta * g * u
        course[k] = u, w
    return course


# %%
# Gradient descent keeps the charge it starts with. SGD forgets it: whatever the start, it goes to 0, the noise
# equilibrium of this model, where both factors have the same gradient noise.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for u in (0.3, 0.6, 2.0, 3.0):
    for axes, batch, title in ((left, None, "gradient descent"), (right, 4, "SGD, batches of 4")):
        course = run(u, 1 / u, batch)
        axes.plot(course[:, 0] ** 2 - course[:, 1] ** 2, lw=1)
        axes.set(title=title, xlabel="step", ylabel="charge $u^2 - w^2$")

# %%
# The theory says how fast, to leading order in ``eta``. With label noise of variance 1 the charge falls by
# ``eta^2 Var[g] (u^2 - w^2)`` a step, by ``exp(-eta^2 Var[g] k)`` in all; ``Var[g]`` is one over the batch
# near the minimum. The fluctuation of the product adds to it in the next order: the charge falls a little faster.
start, many = 2.0, [run(2.0, 0.5, 4) for _ in range(10)]
charges = np.array([c[:, 0] ** 2 - c[:, 1] ** 2 for c in many])
rate = eta**2 / 4
print(f"measured after {steps} steps: {charges[:, -1].mean():.3f} +- {charges[:, -1].std(ddof=1) / 10**0.5:.3f}")
print(f"predicted:                {(start**2 - 1 / start**2) * np.exp(-rate * steps):.3f}, leading order")

# %%
# The paper's own experiments run by name, with a verdict for every claim. Here its figure 1: on a loss that only sees
# the direction of the weights, gradient descent stays near its circle and SGD leaves it for ever.
from noetherflow_paper import run as reproduce  # noqa: E402

folder = Path(tempfile.mkdtemp())
summary = reproduce(["fig1"], out=folder, progress=None)
print(summary)
figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
axes.imshow(plt.imread(folder / "fig1.png"))
axes.axis("off")
