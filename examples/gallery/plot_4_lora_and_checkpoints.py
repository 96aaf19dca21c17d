"""
LoRA and checkpoints
====================

*An adapter is a product of two factors. Is their noise balanced, and can I balance it without changing the model?*
"""

# %%
# A small GPT-2 with an adapter of rank 4 on its attention, trained for some steps.
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers

import noetherflow as nf

warnings.simplefilter("ignore")
torch.manual_seed(0)
sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
model = peft.get_peft_model(base, lora).eval()
texts = torch.randint(40, (32, 16))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)


def loss_fn(model, ids):
    """One loss per text."""
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


for _ in range(40):
    optimizer.zero_grad()
    loss_fn(model, texts[torch.randint(32, (8,))]).mean().backward()
    optimizer.step()

# %%
# Each adapter has one symmetry: any invertible matrix between its two factors.
inputs = {"input_ids": texts[:2]}
syms = nf.find_symmetries(model, inputs).trainable(model)
print(syms)

# %%
# How much noise falls on the two factors?
moments = nf.gradient_moments(model, loss_fn, [texts], syms)
figure, axes = moments.plot()

# %%
# The balanced adapter, and the move there. The outputs stay.
eq = nf.noise_equilibrium(model, syms, moments, nf.SGDConfig(lr=0.3, batch_size=8))
before = model(**inputs).logits
report = nf.balance_(model, eq, optimizer, example_inputs=inputs)
print(report)
print("largest change of a logit:", float((model(**inputs).logits - before).detach().abs().max()))

# %%
# A checkpoint on disk holds the balanced factors, and loads as any other; `noetherflow balance FILE` works on files.
folder = Path(tempfile.mkdtemp())
model.save_pretrained(folder)
print(sorted(path.name for path in folder.iterdir()))
after = nf.gradient_moments(model, loss_fn, [texts], syms)
figure, axes = after.plot()
