"""`move_`, `move_checkpoint` and `gains_to_one` against twins moved by hand, with what must be refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.balance.gains import norm_gains
from noetherflow.errors import CertificateError, CheckpointError, DataError
from zoo import ZOO, Case, output_of
from zoo import call as run

D = torch.float64


def gemma() -> Case:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n:
                p.normal_(std=0.3)
    llama = ZOO["llama"]()
    return Case(model, llama.inputs, llama.loss_fn, llama.batch)


MODELS: dict[str, Callable[[], Case]] = {
    "mlp": ZOO["mlp"],
    "cnn_batchnorm": ZOO["cnn_batchnorm"],
    "gpt2": ZOO["gpt2"],
    "llama": ZOO["llama"],
    "gemma": gemma,
}
TOLERANCE = {"gemma": 1e-6}
"""Its norms multiply by their gains in float32."""


def outputs(case: Case) -> Tensor:
    with torch.no_grad():
        return output_of(run(case.model, case.inputs)).clone()


def trained(case: Case, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss_fn(case.model, case.batch).mean().backward()
        optimizer.step()


def change(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_random_elements_move_model_and_state_as_by_hand(name: str) -> None:
    """Weights by `Symmetry.act`, momentum by `act_on_gradients`, outputs as before."""
    case = MODELS[name]().double()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
    trained(case, optimizer, 2)
    syms = nf.find_symmetries(case.model, case.inputs)
    rng = torch.Generator().manual_seed(3)
    exact = [s for s in syms if s.eps is None]
    elements = {s.name: s.random_element(0.3, rng) for s in exact}
    tensors = nf.tensors_of(case.model)
    weights = {n: t.detach().clone() for n, t in tensors.items()}
    momenta = {n: optimizer.state[t]["momentum_buffer"].clone() for n, t in tensors.items() if t in optimizer.state}
    for s in exact:
        weights |= s.act(weights, elements[s.name])
        momenta |= s.act_on_gradients(momenta, elements[s.name])
    before = outputs(case)
    report = nf.move_(case.model, syms, elements, optimizer)
    assert change(before, outputs(case)) < TOLERANCE.get(name, 1e-12)
    assert report.state_entries > 0
    for n, t in tensors.items():
        torch.testing.assert_close(t.detach(), weights[n], rtol=1e-12, atol=1e-14)
        if n in momenta:
            torch.testing.assert_close(optimizer.state[t]["momentum_buffer"], momenta[n], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["cnn_batchnorm", "gpt2", "llama", "gemma", "layernorm_mlp"])
def test_gains_become_one(name: str) -> None:
    case = MODELS.get(name, ZOO.get(name))().double()  # type: ignore[misc]
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3, momentum=0.9)
    trained(case, optimizer, 1)
    syms = nf.find_symmetries(case.model, case.inputs)
    before = outputs(case)
    with torch.no_grad():
        norms_before = {n: t.clone() for n, t in nf.tensors_of(case.model).items()}
    report = nf.gains_to_one(case.model, syms, optimizer)
    assert change(before, outputs(case)) < TOLERANCE.get(name, 1e-12)
    tensors = nf.tensors_of(case.model)
    offset = 1.0 if name == "gemma" else 0.0
    gains = norm_gains(case.model)
    folded = [n for n in gains if n not in report.skipped]
    assert len(folded) >= {"cnn_batchnorm": 2, "gpt2": 4, "llama": 3, "gemma": 4, "layernorm_mlp": 1}[name]
    for n in folded:
        torch.testing.assert_close(tensors[n].detach() + offset, torch.ones_like(tensors[n]), rtol=1e-12, atol=1e-14)
    for n in set(gains) - set(folded):
        torch.testing.assert_close(tensors[n].detach().abs(), norms_before[n].abs(), rtol=0, atol=0)
    if name in ("gpt2", "gemma"):  # read by the embedding, which is tied to the output layer
        last = "transformer.ln_f.weight" if name == "gpt2" else "model.norm.weight"
        assert last in report.skipped


class Signs(nn.Module):
    """A norm with a negative and a zero gain, read by a linear layer or through a relu."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.read, self.relu = nn.LayerNorm(4, dtype=D), nn.Linear(4, 3, dtype=D), relu
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([2.0, -0.5, 0.0, 1.5]))
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = self.read(y.relu() if self.relu else y)
        return out


@pytest.mark.parametrize(("relu", "want"), [(False, [1.0, 1.0, 0.0, 1.0]), (True, [1.0, -1.0, 0.0, 1.0])])
def test_negative_and_zero_gains(relu: bool, want: list[float]) -> None:
    model, x = Signs(relu), torch.randn(16, 4, dtype=D, generator=torch.Generator().manual_seed(1))
    syms, before = nf.find_symmetries(model, x), model(x)
    report = nf.gains_to_one(model, syms)
    torch.testing.assert_close(model.norm.weight.detach(), torch.tensor(want, dtype=D), rtol=1e-15, atol=0)
    assert change(before, model(x)) < 1e-13
    assert "1 entries are 0" in report.skipped["norm.weight"]
    assert ("are -1" in report.skipped["norm.weight"]) == relu


def test_a_model_without_norms_is_refused() -> None:
    case = ZOO["mlp"]()
    with pytest.raises(DataError, match=r"no normalisation"):
        nf.gains_to_one(case.model, nf.find_symmetries(case.model, case.inputs))


BAD: list[tuple[Any, type[Exception], str]] = [
    ({"nobody": torch.ones(6)}, DataError, "no symmetries named"),
    ({"0 -> 2": torch.ones(5)}, DataError, r"shape \(6,\)"),
    ({"0 -> 2": torch.ones(6, 1)}, DataError, r"shape \(6,\)"),
    ({"0 -> 2": "twice"}, DataError, "must be numbers"),
    ({"0 -> 2": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]}, DataError, "is 0 at coordinate 1"),
    ({"0 -> 2": [1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]}, DataError, "not finite"),
    ({"0 -> 2": [1.0, -2.0, 1.0, 1.0, 1.0, 1.0]}, CertificateError, "negative scales"),
    ({"0 -> 2": [1e200] * 6, "2 -> 4": [1e200] * 5}, CertificateError, "do not fit"),
]


@pytest.mark.parametrize(("elements", "error", "message"), BAD)
def test_bad_elements_are_refused_and_nothing_moves(elements: Any, error: type[Exception], message: str) -> None:
    case = ZOO["mlp"]()
    syms = nf.find_symmetries(case.model, case.inputs)
    before = copy.deepcopy(case.model.state_dict())
    with pytest.raises(error, match=message):
        nf.move_(case.model, syms, elements, example_inputs=case.inputs)
    assert all(torch.equal(before[n], t) for n, t in case.model.state_dict().items())


def test_negative_scales_where_the_model_allows_them() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)).double()
    x = torch.randn(8, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    syms, before = nf.find_symmetries(model, x), model(x)
    nf.move_(model, syms, {syms[0].name: [-2.0, 3.0, 1.0]})
    assert change(before, model(x)) < 1e-14
    assert model[0].weight[0] == -2
    blind = type(syms).from_json(syms.to_json())
    certificate = nf.certify(model, syms, x)
    with pytest.raises(CertificateError, match="pass example_inputs"):
        nf.move_(model, blind, {syms[0].name: [-1.0, 1.0, 1.0]}, certificate=certificate)
    nf.move_(model, blind, {syms[0].name: [1.5, 1.0, 1.0]}, certificate=certificate)


def test_singular_matrices_and_foreign_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)).double()
    x = torch.randn(4, 3, dtype=D)
    syms = nf.find_symmetries(model, x)
    with pytest.raises(DataError, match="singular"):
        nf.move_(model, syms, {syms[0].name: torch.ones(1, 2, 2)})
    with pytest.raises(ValueError, match="another model"):
        nf.move_(nn.Linear(3, 2), syms, {})
    with pytest.raises(DataError, match="move_checkpoint"):
        nf.move_("model.safetensors", syms, {})  # type: ignore[arg-type]


def test_frozen_parameters_do_not_move() -> None:
    case = ZOO["layernorm_mlp"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    name = next(s.name for s in syms if s.family == "norm-gain")
    elements = {name: torch.full(syms[name].shape, 2.0)}
    reader = next(leg.parameter for leg in syms[name].legs if leg.sign < 0)
    nf.tensors_of(case.model)[reader].requires_grad_(False)
    before = copy.deepcopy(case.model.state_dict())
    with pytest.raises(DataError, match="frozen"):
        nf.move_(case.model, syms, elements)
    report = nf.gains_to_one(case.model, syms)
    assert "frozen" in report.skipped["1.weight"]
    assert all(torch.equal(before[n], t) for n, t in case.model.state_dict().items())
    case.model.requires_grad_(True)
    assert not nf.gains_to_one(case.model, syms).skipped


def test_a_tied_embedding_cannot_be_scaled_alone() -> None:
    """GPT-2's ln_f is read by the tied embedding: a declared scale of both is refused by outputs."""
    case = ZOO["gpt2"]().double()
    shapes = {n: tuple(t.shape) for n, t in nf.tensors_of(case.model).items()}
    width = shapes["transformer.ln_f.weight"][0]
    index = torch.arange(width).numpy().reshape(width, 1, 1)
    legs = (nf.Leg("transformer.ln_f.weight", index), nf.Leg("transformer.wte.weight", index, sign=-1, axes=(1,)))
    wrong = nf.SymmetrySet((nf.Symmetry("ln_f -> head", "norm-gain", "diagonal", legs),), shapes=shapes)
    before = copy.deepcopy(case.model.state_dict())
    with pytest.raises(CertificateError, match="more than the tolerance"):
        nf.move_(case.model, wrong, {"ln_f -> head": torch.full((width,), 2.0)}, example_inputs=case.inputs)
    assert all(torch.equal(before[n], t) for n, t in case.model.state_dict().items())


def test_a_file_moves_as_the_model_does(tmp_path: Any) -> None:
    case = ZOO["cnn_batchnorm"]().double()
    syms = nf.find_symmetries(case.model, case.inputs)
    rng = torch.Generator().manual_seed(0)
    elements = {s.name: s.random_element(0.3, rng) for s in syms if s.eps is None}
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(case.model.state_dict(), source)
    nf.move_checkpoint(source, target, case.model, syms, elements, dry_run=True)
    assert not target.exists()
    nf.move_checkpoint(source, target, case.model, syms, elements)
    nf.move_(case.model, syms, elements)
    stored = torch.load(target)
    for n, t in case.model.state_dict().items():
        torch.testing.assert_close(stored[n], t, rtol=1e-15, atol=0)
    bad = {syms[1].name: -torch.ones(syms[1].shape)}
    nf.load_checkpoint_(case.model, target)
    with pytest.raises(CertificateError, match="negative scales"):
        nf.move_checkpoint(target, tmp_path / "c.pt", case.model, syms, bad)
    assert not (tmp_path / "c.pt").exists()


def test_a_file_of_a_model_without_memory_moves_alike(tmp_path: Any) -> None:
    """On the meta device the charges come from the file; what is written is the same, byte by byte."""
    made = lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 2)).to(D)
    torch.manual_seed(0)
    model, x = made(), torch.randn(6, 3, dtype=D)
    with torch.device("meta"):
        outline = made()
    syms = nf.find_symmetries(model, x)
    assert {s.kind for s in syms} == {"diagonal", "general_linear"}
    rng = torch.Generator().manual_seed(0)
    elements = {s.name: s.random_element(0.3, rng) for s in syms}
    torch.save({"net": model.state_dict()}, tmp_path / "a.pt")
    here, there = tmp_path / "here" / "b.pt", tmp_path / "there" / "b.pt"
    nf.move_checkpoint(tmp_path / "a.pt", here, model, syms, elements)
    with pytest.raises(CertificateError, match=r"certificate=.*unchecked=True"):
        nf.move_checkpoint(tmp_path / "a.pt", there, outline, syms, elements)
    proof = nf.certify(model, syms, x)
    report = nf.move_checkpoint(tmp_path / "a.pt", there, outline, syms, elements, certificate=proof, key="net")
    assert len(report.moved) == 5
    assert there.read_bytes() == here.read_bytes() != (tmp_path / "a.pt").read_bytes()
    negative = {syms[0].name: -torch.ones(syms[0].shape)} if syms[0].is_torus else {syms[1].name: -torch.ones(5)}
    for given, error, words in (
        (negative, CertificateError, "meta device does not have: load the checkpoint"),
        ({"nothing": 1.0}, DataError, "no symmetries named"),
    ):
        with pytest.raises(error, match=words):
            nf.move_checkpoint(tmp_path / "a.pt", tmp_path / "d.pt", outline, syms, given, unchecked=True)
    torch.save({"0.weight": torch.ones(5, 3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="missing"):
        nf.move_checkpoint(tmp_path / "other.pt", tmp_path / "d.pt", outline, syms, elements, unchecked=True)
    assert not (tmp_path / "d.pt").exists()


def test_weights_without_values_are_named_with_the_way_out() -> None:
    made = lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 2))
    with torch.device("meta"):
        outline = made()
    model = made()
    syms = nf.find_symmetries(outline, torch.zeros(2, 3))
    eq = nf.noise_equilibrium(model, syms, None, objective="norm")
    verbs = {
        "move_": lambda: nf.move_(outline, syms, {}),
        "balance_": lambda: nf.balance_(outline, eq),
        "gains_to_one": lambda: nf.gains_to_one(outline, syms),
        "align": lambda: nf.align(model, outline, syms),
        "noise_equilibrium": lambda: nf.noise_equilibrium(outline, syms, None, objective="norm"),
    }
    for verb, go in verbs.items():
        with pytest.raises(DataError, match=rf"{verb} needs the values.*0\.weight.*meta device.*load_checkpoint_"):
            go()


def test_a_sharded_folder_moves(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    case = ZOO["llama"]().double()
    case.model.save_pretrained(tmp_path / "a", max_shard_size="3KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    syms = nf.find_symmetries(case.model, case.inputs)
    rng = torch.Generator().manual_seed(0)
    elements = {s.name: s.random_element(0.3, rng) for s in syms if s.eps is None}
    nf.move_checkpoint(tmp_path / "a", tmp_path / "b", case.model, syms, elements)
    moved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=D).eval()
    assert change(outputs(case), outputs(Case(moved, case.inputs, case.loss_fn, case.batch))) < 1e-9
    nf.move_(case.model, syms, elements)
    for n, t in nf.tensors_of(case.model).items():
        if isinstance(t, nn.Parameter):
            torch.testing.assert_close(nf.tensors_of(moved)[n].detach(), t.detach(), rtol=1e-12, atol=1e-15)
