"""
AdamW on a small Llama
======================

*Which norms grow? Is the warmup long enough? Which heads are imbalanced? Does weight decay bite? What should I change?*
"""

# %%
# A Llama of two layers on the text of Python's own documentation, one token per character.
import pydoc_data.topics
import warnings

import torch
import transformers

import noetherflow as nf

warnings.simplefilter("ignore")
torch.manual_seed(0)
text = "".join(pydoc_data.topics.topics.values())[:100_000]
letters = sorted(set(text))
ids = torch.tensor([letters.index(c) for c in text])
config = transformers.LlamaConfig(
    vocab_size=len(letters),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config)
model.config.use_cache = False
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def batch(size=16, context=32):
    starts = torch.randint(len(ids) - context, (size,))
    return {"input_ids": torch.stack([ids[s : s + context] for s in starts])}


def loss_fn(model, inputs):
    """One loss per text: the mean over its letters."""
    logits = model(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, inputs["input_ids"][:, 1:], reduction="none").mean(1)


for _ in range(60):
    optimizer.zero_grad()
    loss = loss_fn(model, batch()).mean()
    loss.backward()
    optimizer.step()
print(f"loss after 60 steps: {float(loss):.2f}")

# %%
# One call measures and answers; `steps` says how long the training will go on. A list of batches is measured whole:
# with `b1` of 0.9 some 300 samples tell the mean gradient from noise, and 512 do so for every head.
analysis = nf.analyze(
    model, loss_fn, [batch(32) for _ in range(16)], nf.optimizer_config(optimizer, 16), steps=2000, curvature=False
)
print(analysis.diagnosis)

# %%
# The same as pictures: what moves the charges, how long they take, how far heads and units are from equilibrium.
figure, axes = analysis.flow.plot(most=14)

# %%
figure, axes = analysis.equilibrium.plot(most=14)
