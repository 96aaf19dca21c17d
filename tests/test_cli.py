"""The command line: output, JSON, exit codes, and errors without tracebacks for bad input of every kind."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import typer.main
from safetensors.torch import load_file, save_file
from torch import nn

import noetherflow as nf
from noetherflow.cli import main
from noetherflow.cli.app import app
from noetherflow.cli.demonstration import Told, summary
from noetherflow.cli.output import fit_for_any_terminal
from noetherflow.core.files import write_text
from noetherflow.core.printing import legend
from noetherflow.discovery.hf import load_hf
from noetherflow.equilibrium.flow import EXPLAINED
from noetherflow.errors import DataError, ExportError
from noetherflow.report.page import Notice
from noetherflow.workloads import CONTRACT

FACTORIES = """
import torch
from torch import nn

def per_sample(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1)

def reduced(model, batch):
    return per_sample(model, batch).mean()

def data(n=12):
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=rng).double(), torch.randn(n, 2, generator=rng).double())]

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()

def good():
    return net(), per_sample, data()

def scalar_loss():
    return net(), reduced, data()

def nan_data(row=7):
    (x, y), = data()
    x[row, 1] = float("nan")
    return net(), per_sample, [(x, y)]

def nan_example():
    return nan_data(0)

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)

def branch():
    return Branch(), per_sample, data()

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.spare = nn.Parameter(torch.zeros(5).double())

    def forward(self, x):
        return self.net(x)

def unused():
    return Unused(), per_sample, data()

def boom():
    torch.zeros(2) @ torch.zeros(3)

def parse():
    import json
    return json.loads("{")

def two():
    return net(), torch.ones(2, 3).double()

def empty():
    return net(), per_sample, data() + data(0)

def frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    return model, per_sample, data()
"""


def line_of(text: str) -> int:
    return FACTORIES[: FACTORIES.index(text)].count("\n") + 1


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command; returns exit code, standard output and standard error."""
    name = f"cli_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            main([w.replace("MODULE", name) for w in words])
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return go


def test_find_prints_a_table_and_json(run):
    code, out, _ = run("find", "MODULE:good", "--certify")
    assert code == 0
    assert "rescaling" in out
    assert "exact" in out
    assert " ".join(legend("family", "blocks", "charges").split()) in " ".join(out.split())
    code, out, _ = run("find", "MODULE:good", "--json")
    assert code == 0
    assert nf.SymmetrySet.from_dict(json.loads(out)).n_charges() == 4


def test_find_reads_a_hugging_face_configuration_without_weights(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=31,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "tiny")
    code, out, _ = run("find", "hf:tiny", "--json")
    assert code == 0
    found = nf.SymmetrySet.from_dict(json.loads(out))
    by_family = {row["family"]: row["charges"] for row in found.summary()}
    assert by_family["attention-vo"] == 2 * 4 * 5 // 2
    assert by_family["rotary-qk"] == 2 * 2
    assert by_family["gated"] == 12
    assert by_family["norm-gain"] == 3 * 16
    code, out, _ = run("find", "hf:tiny", "--explain", "model.layers.0.mlp.up_proj.weight")
    assert code == 0
    assert "up_proj" in out


def mixture_of_experts(folder, depth):
    transformers = pytest.importorskip("transformers")
    transformers.MixtralConfig(
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=13,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(folder)


def test_find_certifies_a_mixture_of_experts(run, tmp_path):
    mixture_of_experts(tmp_path / "moe", 1)
    code, out, _ = run("find", "hf:moe", "--json", "--certify")
    assert code == 0
    verdicts = {row["name"]: row["verdict"] for row in json.loads(out)["certificate"]["rows"]}
    assert "model.layers.0.mlp.experts.gate_up_proj -> model.layers.0.mlp.experts.down_proj" in verdicts
    assert verdicts.pop("model.embed_tokens (+2) [scale]") == "approximate"
    assert (len(verdicts), set(verdicts.values())) == (7, {"exact"})


@pytest.mark.slow
def test_certifying_a_deeper_mixture_of_experts_takes_no_more_runs(tmp_path, monkeypatch):
    """With 4 moves at most a second and third layer add 12 symmetries, which one by one would take 36 runs more."""
    monkeypatch.setattr("noetherflow.discovery.violations.MOST_MOVES", 4)
    runs, calls, certified = [], [], []
    forward = pytest.importorskip("transformers").MixtralForCausalLM.forward

    def counted(*args, **kwargs):
        runs.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr("transformers.MixtralForCausalLM.forward", counted)
    for depth in (1, 3):
        mixture_of_experts(tmp_path / str(depth), depth)
        model, inputs = load_hf(tmp_path / str(depth), device="cpu")
        syms = nf.find_symmetries(model, inputs)
        runs.clear()
        certificate = nf.certify(model, syms, inputs)
        calls.append(len(runs))
        certified.append(len(certificate.rows))
        assert not certificate.refused
    assert certified[1] == certified[0] + 12
    assert calls[1] <= calls[0] + 6


def test_analyze_json_agrees_with_the_library(run):
    code, out, _ = run("analyze", "MODULE:good", "--json", "--lr", "0.1", "--batch-size", "4")
    assert code == 0
    found = json.loads(out)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    charge = (model[0].weight.square().sum(1) + model[0].bias.square() - model[2].weight.square().sum(0)).detach()
    (symmetry,) = found["flow"]["symmetries"]
    assert torch.allclose(torch.tensor(symmetry["charge"], dtype=torch.float64), charge)
    assert found["equilibrium"]["converged"]


def test_analyze_writes_a_report(run, tmp_path):
    code, out, err = run("analyze", "MODULE:good", "--batch-size", "4", "--report", "page.html")
    assert code == 0
    assert "Noether flow" in out
    assert " ".join(legend(*EXPLAINED).split()) in " ".join(out.split())
    assert f"report: {tmp_path / 'page.html'}\n" in out
    first, *stages = err.splitlines()
    assert first.endswith("good: seconds for tracing, then a few gradient passes over 12 samples")
    assert (stages[0], stages[-1]) == ("[1/6] tracing the model", "[6/6] measuring curvature")
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64" in page
    assert "http://" not in page.split("<body")[1]


def test_balance_moves_a_checkpoint_and_keeps_its_function(run, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.mul_(8)
    x = torch.randn(20, 3, dtype=torch.float64)
    before = model(x)
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    words = ("balance", "in.safetensors", "--model", "MODULE:good", "--batch-size", "4", "--objective", "noise+decay")
    code, out, _ = run(*words, "--dry-run")
    assert code == 0
    assert "\nwould move\n" in out
    assert "\nwould move 3 tensors, " in out
    assert not (tmp_path / "out.safetensors").exists()
    code, out, err = run(*words, "--out", "out.safetensors")
    assert code == 0
    assert err.splitlines()[-1] == "[5/5] moving the checkpoint"
    assert "\nwritten to out.safetensors\n" in out
    assert "\nmoved 3 tensors, " in out
    moved = load_file(tmp_path / "out.safetensors")
    assert not torch.allclose(moved["0.weight"], model[0].weight)
    model.load_state_dict(moved)
    assert torch.allclose(model(x), before, rtol=1e-11)
    assert run(*words)[0] == 2
    assert run(*words[:-2], "--dry-run")[0] == 2, "the objective is asked for"
    code, _, err = run(*words, "--dry-run", "--weight-decay", "0.1")
    assert (code, "--lr" in err) == (2, True)
    (tmp_path / "bad.safetensors").write_bytes(b"broken")
    code, _, err = run("balance", "bad.safetensors", *words[2:], "--dry-run")
    assert code == 1
    assert "bad.safetensors" in err


def test_balance_without_a_certificate_warns_and_compares_outputs(run, tmp_path, monkeypatch):
    """A wrong symmetry is then stopped by the outputs, or by gradients that do not obey it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    words = ("balance", "in.safetensors", "--model", "MODULE:good", "--batch-size", "4", "--objective", "noise+decay")
    assert run(*words, "--out", "proven.safetensors")[0] == 0

    def refused(*_, **__):
        raise AssertionError("certified in spite of --no-certify")

    monkeypatch.setattr("noetherflow.measured.certify", refused)
    monkeypatch.setattr("noetherflow.discovery.certify", refused)
    for objective in ("noise+decay", "norm"):
        code, _, err = run(*words[:-1], objective, "--no-certify", "--out", f"{objective}.safetensors")
        assert (code, "warning: not certified" in err) == (0, True)
    proven, moved = load_file(tmp_path / "proven.safetensors"), load_file(tmp_path / "noise+decay.safetensors")
    assert all(torch.equal(moved[n], proven[n]) for n in proven)
    wrong = nf.declare(model, "diagonal", plus=[("0.weight", 0)], minus=[("2.weight", 1)])
    for place in ("noetherflow.measured", "noetherflow.discovery"):
        monkeypatch.setattr(f"{place}.find_symmetries", lambda *_: wrong)
    for objective, stopped in (("norm", "changed the outputs"), ("noise+decay", "would be 0 for a loss with this")):
        code, _, err = run(*words[:-1], objective, "--no-certify", "--out", "wrong.safetensors")
        assert (code, stopped in err) == (1, True)
    assert not (tmp_path / "wrong.safetensors").exists()


def test_balance_takes_objective_and_settings_of_the_optimiser(run, tmp_path, monkeypatch):
    def not_used(*_, **__):
        raise AssertionError("balancing needs no forecast")

    monkeypatch.setattr("noetherflow.analysis.noether_flow", not_used)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    words = ("balance", "in.safetensors", "--model", "MODULE:good", "--batch-size", "4", "--lr", "0.1", "--json")

    def elements(*more):
        objective = () if "--objective" in more else ("--objective", "noise+decay")
        code, out, _ = run(*words, "--weight-decay", "0.05", "--dry-run", *objective, *more)
        assert code == 0
        (settled,) = json.loads(out)["equilibrium"]["settled"]
        return torch.tensor(settled["element"])

    plain, heavy = elements(), elements("--momentum", "0.1")
    assert not torch.allclose(heavy, plain)
    assert not torch.allclose(elements("--objective", "noise"), plain)
    assert not torch.allclose(elements("--momentum", "0.1", "--nesterov"), heavy)
    assert not torch.allclose(elements("--momentum", "0.1", "--dataset-size", "20"), heavy)
    assert torch.equal(elements("--tolerance", "1e-12"), plain)
    assert run(*words, "--objective", "norm", "--out", "out.safetensors")[0] == 0
    new = load_file(tmp_path / "out.safetensors")
    up = new["0.weight"].square().sum(1) + new["0.bias"].square()
    assert torch.allclose(up, new["2.weight"].square().sum(0), rtol=1e-9)
    code, _, err = run(*words, "--dry-run", "--objective", "nois")
    assert (code, "did you mean 'noise'?" in err) == (1, True)
    code, _, err = run(*words, "--dry-run", "--objective", "hessian")
    assert (code, "curvature" in err) == (2, True)
    code, _, err = run(*words, "--objective", "norm", "--out", "in.safetensors/out.safetensors")
    assert code == 1
    assert "could not write" in err
    code, _, err = run(*words, "--objective", "noise+decay", "--dry-run", "--tolerance", "0")
    assert code == 1
    assert "more than the tolerance" in err


def test_report_of_a_recorded_run(run, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    syms = nf.find_symmetries(model, torch.ones(2, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ledger = nf.Ledger(model, optimizer, syms, run_dir=tmp_path / "run", every=1)
    with ledger:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    code, _, _ = run("report", "run")
    assert code == 0
    assert (tmp_path / "run" / "report.html").exists()
    code, _, err = run("report", "nowhere")
    assert code == 1
    assert "nowhere" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("analyze", "MODULE:scalar_loss"), "per-sample losses"),
        (("analyze", "MODULE:nan_data"), "the batch itself holds NaN"),
        (("analyze", "MODULE:nan_example"), "not finite"),
        (("analyze", "MODULE:branch"), "declare"),
        (("analyze", "MODULE:good", "--batch-size", "99", "--finite-data"), "larger than dataset_size 12"),
        (("analyze", "MODULE:good", "--lr", "-1"), "lr must be a positive"),
        (("find", "nothing-here"), "neither a built-in example"),
        (("find", "digits-mpl"), "; did you mean digits-mlp?"),
        (("find", "hf:/no/such/config.json"), "/no/such/config.json"),
        (("analyze", "hf:config.json"), f"without data or loss; give package.module:factory with {CONTRACT}"),
        (("analyze", "MODULE:two"), CONTRACT),
        (("analyze", "MODULE:empty"), "batch 1 is empty (first tensor has shape (0, 3))"),
        (("analyze", "MODULE:boom"), f".py:{line_of('@')} (boom): inconsistent tensor size"),
        (("analyze", "MODULE:parse"), f".py:{line_of('return json')} (parse): Expecting property name"),
        (("watch", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_clear_message(run, words, message):
    code, _, err = run(*words)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_too_few_samples_are_an_open_question_with_their_number(run):
    code, out, _ = run("analyze", "MODULE:good", "--batch-size", "99")
    assert code == 0
    assert "measure at least 99 samples" in " ".join(out.split())
    assert "All symmetries hold" in out


def test_a_file_of_the_user_is_named_from_the_current_folder(run):
    assert re.match(r"RuntimeError in cli_\w+\.py:\d+ \(boom\): ", run("find", "MODULE:boom")[2])


def test_find_takes_a_model_with_example_inputs(run):
    code, out, _ = run("find", "MODULE:two")
    assert code == 0
    assert re.match(r"\w+:two: 4 independent Noether charges\n", out)


@pytest.mark.parametrize("command", ["find", "analyze", "balance"])
def test_the_contract_of_a_factory_stands_in_the_help(command):
    parameters = typer.main.get_command(app).commands[command].params
    (text,) = (p.help for p in parameters if p.name == "model")
    assert CONTRACT in text
    assert "PYTHONPATH" in text
    assert ("hf:PATH" in text) == (command != "analyze")


def test_debug_shows_the_error_itself(run):
    with pytest.raises(DataError):
        run("find", "nothing-here", "--debug")


def test_wrong_usage_exits_2(run):
    assert run("find")[0] == 2
    assert run("find", "digits-mlp", "--no-such-option")[0] == 2


def test_unused_parameters_do_not_stop_an_analysis(run):
    code, out, _ = run("analyze", "MODULE:unused", "--batch-size", "4")
    assert code == 0
    assert "spare" not in out


def test_frozen_parameters_are_excluded_and_listed(run):
    code, out, _ = run("analyze", "MODULE:frozen", "--batch-size", "4")
    assert code == 0
    assert "frozen parameter 0.weight" in " ".join(out.split())


def test_a_model_with_a_branch_on_data_names_the_reason_and_the_way_out():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.b = nn.Linear(4, 2)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.b(h) if x.sum() > 0 else -self.b(h)

    model, x = Branch(), torch.ones(2, 3)
    with pytest.raises(ExportError, match=r"nf\.declare"):
        nf.find_symmetries(model, x)
    syms = nf.declare(model, "diagonal", plus=[("a.weight", 0), ("a.bias", 0)], minus=[("b.weight", 1)])
    assert [r.verdict for r in nf.certify(model, syms, x)] == ["exact"]


def test_the_summary_of_a_demo_has_the_numbers_of_its_run():
    told = Told(
        "net",
        28,
        ("exact", "exact", "approximate"),
        steps=6000,
        change=0.81,
        error=0.0312,
        outputs=2.6e-16,
        before=0.97,
        after=5e-12,
    )
    other = dataclasses.replace(told, name="two", verdicts=("exact",) * 2, steps=500)
    reproduced = Notice("watch", "Reproduced: 13 of 14 claims hold.")
    card = summary([told, other], [reproduced])
    found, forecast, second, balanced, _, last = card.notices
    assert "5 continuous symmetries, 3 in `net` (28 charges) and 2 in `two` (28 charges); checked" in found.title
    assert found.title.endswith("group elements, 4 exact and 1 approximate.")
    assert (
        "`net` over 6,000 further steps to 3.1 % of their norm, while training changed them by 81 %" in forecast.title
    )
    assert "`two` over 500" in second.title
    assert "from 0.97 to 5 × 10⁻¹²; its outputs changed by 2.6 × 10⁻¹⁶" in balanced.title
    assert last is reproduced
    assert "a charge is" in card.prose
    assert {n.level for n in card.notices[:-1]} == {"good"}
    worse = dataclasses.replace(other, verdicts=("exact", "broken"), error=0.9, after=0.98)
    assert [n.level for n in summary([worse], []).notices] == ["act", "watch", "watch"]
    assert "elements, 2 exact." in summary([other], []).notices[0].title


@pytest.mark.slow
def test_demo_writes_one_page(run, tmp_path):
    code, out, err = run("demo", "--quick", "--out", "demo")
    assert code == 0
    assert "imbalance measured again" in " ".join(out.split())
    assert f"\nopen {tmp_path / 'demo' / 'index.html'} (" in out
    first, *stages = err.splitlines()
    assert "figure 2 of the paper: 1 to 2 minutes" in first
    assert [s.split("]")[0] for s in stages] == [f"[{k}/10" for k in range(1, 11)]
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("data:image/png;base64") >= 7
    assert page.index("<h2>Summary</h2>") == page.index("<h2>")


LOUD = """
print("at import")

def model():
    print("in the factory")
    made = net()
    made.register_forward_hook(lambda *_: print("in the forward"))
    return made, per_sample, data()
"""


def test_json_is_valid_though_the_users_code_prints(run, tmp_path):
    (tmp_path / "loud.py").write_text(FACTORIES + LOUD)
    code, out, err = run("analyze", "loud:model", "--json", "--batch-size", "2")
    assert code == 0, err
    assert json.loads(out)["model"] == "loud:model"
    for said in ("at import", "in the factory", "in the forward"):
        assert said in err


def test_terminals_without_the_letters_get_plain_ones():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    fit_for_any_terminal(stream)
    stream.write("3 ± 1 → – ∑")
    stream.flush()
    assert raw.getvalue() == b"3 +- 1 -> - ?"


def test_outputs_are_tried_before_the_work_starts(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for arguments in (
        ["analyze", "linear-factorisation", "--report", str(blocked / "page.html")],
        ["analyze", "linear-factorisation", "--report", str(tmp_path)],
        ["demo", "--out", str(blocked)],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 1
        printed = capsys.readouterr()
        assert "DataError: cannot write" in printed.err
        assert "[1/6]" not in printed.err, "nothing was begun"


def test_files_are_written_through_symbolic_links(tmp_path):
    real, link = tmp_path / "there" / "page.txt", tmp_path / "link.txt"
    real.parent.mkdir()
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert [p.name for p in real.parent.iterdir()] == ["page.txt"]


CONFIGURATION = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "bos_token_id": 0}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ([], "holds a JSON list"),
        ({"model_type": 7}, "names no model_type"),
        ({"model_type": "nosuch"}, "does not know the model_type 'nosuch'"),
        ({**CONFIGURATION, "vocab_size": 0, "eos_token_id": None}, "vocab_size is 0"),
        ({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 3}, "refuses the configuration"),
        ({**CONFIGURATION, "n_head": 3, "eos_token_id": 0}, "cannot build GPT2Config"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_odd_configurations_are_refused_in_words(tmp_path, config, complaint):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=complaint):
        load_hf(tmp_path)


def test_a_configuration_cannot_make_code_be_fetched(tmp_path):
    pytest.importorskip("transformers")
    parts = {"_attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "someone/repo--code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGURATION, "eos_token_id": 0, **parts}))
    model, _ = load_hf(tmp_path)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(model.config, "auto_map")


@pytest.mark.parametrize("point", ["import rich", "import torch"])
def test_interrupts_while_the_command_loads_are_quiet(tmp_path, point):
    hook = f"""
import builtins, sys
real = builtins.__import__
def interrupted(name, *rest, **named):
    if name.split(".")[0] == {point.split()[1]!r}:
        raise KeyboardInterrupt
    return real(name, *rest, **named)
builtins.__import__ = interrupted
from noetherflow.cli import main
main(["find", "digits-mlp"])
"""
    done = subprocess.run([sys.executable, "-c", hook], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_version_is_printed(run):
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"noetherflow {nf.__version__}")


def test_experiments_are_listed_with_their_settings(run, tmp_path):
    code, out, _ = run("reproduce", "--list")
    assert code == 0
    for word in ("fig1", "Warmup works", "settings (--set)", "lr=0.05"):
        assert word in out
    assert not (tmp_path / "reproduction").exists()
