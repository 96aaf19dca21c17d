"""Every refusal of checkpoint work, tried: its message names the remedy, and nothing is written.

The set-ups with more to show than the message stand in the tests of safety, folders and torch.distributed.checkpoint.
"""

from __future__ import annotations

import ast
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import noetherflow as nf
from equilibrium_cases import mlp
from noetherflow.balance.align_file import align_checkpoint
from noetherflow.errors import NoetherflowError
from test_checkpoint_safety import Unsafe, sharded, trained_twins

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BALANCE = Path(nf.__file__).parent / "balance"


@dataclass
class Bed:
    """A small model, the destination of its move, and an empty folder."""

    folder: Path
    model: nn.Sequential
    eq: Any
    patch: pytest.MonkeyPatch

    @property
    def state(self) -> dict[str, Any]:
        return self.model.state_dict()

    def move(self, source: str, target: str = "out.safetensors", **options: Any) -> Any:
        given = {"unchecked": True, "model": self.model, "eq": self.eq} | options
        return nf.balance_checkpoint(self.folder / source, self.folder / target, **given)

    def saved(self, content: Any = None, name: str = "a.pt") -> str:
        torch.save(self.state if content is None else content, self.folder / name)
        return name

    def tensors(self, change: dict[str, Any], name: str = "a.safetensors") -> str:
        save_file({n: t for n, t in (self.state | change).items() if t is not None}, self.folder / name)
        return name

    def shards(self, name: str = "in") -> Path:
        sharded(self.state, self.folder / name, 2)
        return self.folder / name

    def distributed(self, name: str = "in") -> Path:
        dcp.save(dict(self.state), checkpoint_id=self.folder / name, no_dist=True)
        return self.folder / name

    def described(self, change: Callable[[Any], Any]) -> None:
        """A folder of torch.distributed.checkpoint whose description is changed."""
        path = self.distributed() / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))
        self.move("in")

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(*(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))).double()


@dataclass(frozen=True)
class Refusal:
    """What is tried, and the words of trouble and remedy that the message must have."""

    attempt: Callable[[Bed], Any]
    remedy: tuple[str, ...]


TABLE: dict[str, Refusal] = {}
STAYS: dict[str, Refusal] = {}
"""Not refused: the state stays, and the report's `unmoved` has the remedy."""


def refused(*remedy: str, table: dict[str, Refusal] = TABLE) -> Callable[[Any], Any]:
    def noted(attempt: Callable[[Bed], Any]) -> Callable[[Bed], Any]:
        table[attempt.__name__] = Refusal(attempt, remedy)
        return attempt

    return noted


def stays(*remedy: str) -> Callable[[Any], Any]:
    return refused(*remedy, table=STAYS)


# what is read


@refused("no checkpoint at", "give a .safetensors or PyTorch file, an index, or a folder")
def nothing_there(bed: Bed) -> None:
    bed.move("nothing.pt")


@refused("one of 2 shards", "name the folder", "model.safetensors.index.json")
def a_lone_shard(bed: Bed) -> None:
    bed.shards()
    bed.move("in/model-00002-of-00002.safetensors")


@refused("one of 2 shards", "its index", "save_pretrained writes")
def a_lone_shard_without_its_index(bed: Bed) -> None:
    (bed.shards() / "model.safetensors.index.json").unlink()
    bed.move("in/model-00001-of-00002.safetensors")


@refused("shards", "no index beside them", "save_pretrained writes one")
def shards_without_their_index(bed: Bed) -> None:
    (bed.shards() / "model.safetensors.index.json").unlink()
    bed.move("in", "out")


@refused("model-00001-of-00002.safetensors", "copy them beside it")
def an_index_without_its_shards(bed: Bed) -> None:
    (bed.shards() / "model-00001-of-00002.safetensors").unlink()
    bed.move("in", "out")


@refused("not a readable index", "copy it again", "save_pretrained")
def an_index_that_is_none(bed: Bed) -> None:
    (bed.shards() / "model.safetensors.index.json").write_text("{}")
    bed.move("in", "out")


@refused("name different tensors: ['0.bias']", "copy the folder again")
def an_index_of_other_tensors(bed: Bed) -> None:
    index = bed.shards() / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["0.bias"]
    index.write_text(json.dumps(content))
    bed.move("in", "out")


@refused("holds its weights twice", "keep one of them, or name the file")
def weights_twice(bed: Bed) -> None:
    bed.saved(name=f"{bed.shards().name}/pytorch_model.bin")
    bed.move("in", "out")


@refused("without weights", "looked for model.safetensors")
def an_empty_folder(bed: Bed) -> None:
    (bed.folder / "in").mkdir()
    bed.move("in", "out")


@refused("name the checkpoint file in it (epoch=3.ckpt)")
def a_folder_of_another_tool(bed: Bed) -> None:
    (bed.folder / "in").mkdir()
    bed.saved(name="in/epoch=3.ckpt")
    bed.move("in", "out")


@refused("DeepSpeed", "join its parts first, python zero_to_fp32.py . joined")
def a_folder_of_deepspeed(bed: Bed) -> None:
    (bed.folder / "in").mkdir()
    (bed.folder / "in" / "zero_to_fp32.py").write_text("")
    bed.move("in", "out")


@refused("GGUF", "convert it first", "gguf_file='model.gguf'", "save_pretrained", "convert_hf_to_gguf.py")
def gguf(bed: Bed) -> None:
    (bed.folder / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    bed.move("model.gguf")


@refused("GGUF", "convert it first")
def gguf_by_another_name(bed: Bed) -> None:
    (bed.folder / "model.safetensors").write_bytes(b"GGUF" + bytes(20))
    bed.move("model.safetensors")


@refused("could run code", "torch.serialization.add_safe_globals", "or save the weights again without it")
def an_unknown_class(bed: Bed) -> None:
    bed.move(bed.saved({"model": bed.state, "what": Unsafe()}))


@refused("not a readable checkpoint", "copy it again, or save it again")
def a_torch_file_cut_off(bed: Bed) -> None:
    path = bed.folder / bed.saved()
    path.write_bytes(path.read_bytes()[:-40])
    bed.move("a.pt")


@refused("not a readable checkpoint", "copy it again, or save it again")
def a_safetensors_file_cut_off(bed: Bed) -> None:
    path = bed.folder / bed.tensors({})
    path.write_bytes(path.read_bytes()[:-40])
    bed.move("a.safetensors")


@refused("holds a list, not a dictionary", "save model.state_dict()")
def a_list(bed: Bed) -> None:
    bed.move(bed.saved(list(bed.state.values())))


@refused("no named tensors", "say which by key= (--key)")
def no_tensors_in_a_torch_file(bed: Bed) -> None:
    bed.move(bed.saved({"epoch": 3}))


@refused("no named tensors", "name the file with the weights")
def no_tensors_in_a_safetensors_file(bed: Bed) -> None:
    save_file({}, bed.folder / "a.safetensors")
    bed.move("a.safetensors")


@refused("['actor', 'critic']", "say which by key= (--key)")
def two_models_in_one_file(bed: Bed) -> None:
    bed.move(bed.saved({"actor": bed.state, "critic": bed.state}))


@refused("nothing under 'net'", "give one of its keys: ['model', 'epoch']")
def a_key_that_is_not_there(bed: Bed) -> None:
    bed.move(bed.saved({"model": bed.state, "epoch": 3}), key="net")


@refused("under 'epoch'", "give the key of a dictionary of them")
def a_key_of_something_else(bed: Bed) -> None:
    bed.move(bed.saved({"model": bed.state, "epoch": 3}), key="epoch")


@refused("no nesting", "leave it out")
def a_key_for_safetensors(bed: Bed) -> None:
    bed.move(bed.tensors({}), key="model")


# what it holds


@refused("missing in the file: ['2.weight']", "build the model as that of the file was")
def a_missing_tensor(bed: Bed) -> None:
    bed.move(bed.tensors({"2.weight": None}))


@refused("unknown to the model: ['extra']", "or name the checkpoint of this model")
def a_tensor_too_many(bed: Bed) -> None:
    bed.move(bed.tensors({"extra": torch.zeros(2)}))


@refused("0.bias: file (9,), model (8,)", "build the model as that of the file was (its configuration)")
def another_shape(bed: Bed) -> None:
    bed.move(bed.tensors({"0.bias": torch.zeros(9)}))


@refused("say so: prefix= (--prefix), 'net.0.bias'")
def an_unknown_prefix(bed: Bed) -> None:
    save_file({f"net.{n}": t for n, t in bed.state.items()}, bed.folder / "a.safetensors")
    bed.move("a.safetensors")


@refused("differ, but the model ties them", "Build the model without tying (tie_word_embeddings=False")
def an_untied_file_for_a_tied_model(bed: Bed) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    bed.saved({n: t.clone() for n, t in model.state_dict().items()})
    model[2].weight = model[0].weight
    syms = nf.find_symmetries(model, torch.zeros(1, 4))
    bed.move("a.pt", model=model, eq=nf.noise_equilibrium(model, syms, None, objective="norm"))


@refused("a PEFT adapter alone", "wrap the base model first, model = peft.PeftModel.from_pretrained(base")
def an_adapter_for_a_model_without(bed: Bed) -> None:
    (bed.folder / "in").mkdir()
    save_file({"base_model.model.0.lora_A.weight": torch.ones(2, 6)}, bed.folder / "in" / "adapter_model.safetensors")
    bed.move("in", "out")


@refused("quantised", "Balance the checkpoint in floating point, then quantise")
def whole_numbers(bed: Bed) -> None:
    whole = {n: (20 * t).round().to(torch.int8) for n, t in bed.state.items()}
    bed.model.load_state_dict(whole)
    bed.move(bed.tensors(whole), model=bed.outline(), eq=least_norm(bed.model))


@refused("torch.float8_e4m3fn", "dequantise the checkpoint to bfloat16 first")
def eight_bits(bed: Bed) -> None:
    bed.move(bed.tensors({"0.weight": bed.state["0.weight"].to(torch.float8_e4m3fn)}))


@refused("stored as F4", "dequantise the checkpoint to bfloat16 first")
def four_bits(bed: Bed) -> None:
    header = json.dumps({"0.weight": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}).encode()
    (bed.folder / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    bed.move("a.safetensors")


@refused("0.weight", "load the checkpoint first (load_checkpoint_), measure and solve on it")
def weights_of_another_run(bed: Bed) -> None:
    bed.move(bed.tensors({"0.weight": bed.state["0.weight"] + 1}))


@refused("is it of another checkpoint? Solve again for this")
def weights_of_another_run_without_memory(bed: Bed) -> None:
    bed.move(bed.tensors({"0.weight": 2 * bed.state["0.weight"]}), model=bed.outline())


@refused("do not fit torch.float16", "use a wider dtype")
def values_too_large_for_their_dtype(bed: Bed) -> None:
    bed.model.half()
    syms = bed.eq.symmetries
    elements = {s.name: torch.full(s.shape, 1e6) for s in syms}
    nf.move_checkpoint(
        bed.folder / bed.tensors({}), bed.folder / "out.safetensors", bed.model, syms, elements, unchecked=True
    )


@refused("which", "does not hold; freeze them", "or balance the file that holds them")
def parameters_that_lie_in_another_file(bed: Bed) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0", "2"], r=2)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), config).eval()
    model.requires_grad_(True)
    model.save_pretrained(bed.folder / "in")
    syms = nf.find_symmetries(model, torch.randn(2, 6))
    bed.move("in", "out", model=model, eq=nf.noise_equilibrium(model, syms, None, objective="norm"))


@refused("meta device", "make memory for it first, model.to_empty")
def loading_into_a_model_without_memory(bed: Bed) -> None:
    nf.load_checkpoint_(bed.outline(), bed.folder / bed.saved())


# where it is written


@refused("takes", "free some, or name a target on another disk")
def a_full_disk(bed: Bed) -> None:
    bed.patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    bed.move(bed.saved())


@refused("No space left", "free the place, or name another target")
def a_disk_that_fills_meanwhile(bed: Bed) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    bed.patch.setattr("os.fsync", full)
    bed.move(bed.saved())


@refused("must be a new one", "name another target")
def a_folder_that_exists(bed: Bed) -> None:
    bed.shards()
    (bed.folder / "there").mkdir()
    bed.move("in", "there")


@refused("the folder exists; name a new one")
def a_folder_that_appears_meanwhile(bed: Bed) -> None:
    bed.shards()
    bed.move("in", "there", progress=lambda name: (bed.folder / "there").mkdir(exist_ok=True))


@refused("it is a folder; name a file in it")
def a_folder_for_a_file(bed: Bed) -> None:
    (bed.folder / "there").mkdir()
    bed.move(bed.saved(), "there")


@refused("could not write", "name another target")
def a_file_in_the_place_of_a_folder(bed: Bed) -> None:
    bed.move(bed.saved(), "a.pt/out.pt")


@refused("missing in the file", "name the checkpoint of this model")
def aligning_with_another_architecture(bed: Bed) -> None:
    bed.saved({"0.weight": torch.ones(8, 6)}, "other.pt")
    x = torch.zeros(1, 6, dtype=torch.float64)
    paths = (bed.folder / "other.pt", bed.folder / bed.saved(), bed.folder / "out.pt")
    align_checkpoint(*paths, bed.model, bed.eq.symmetries, example_inputs=x)


@refused("hold no torch.complex128", "name a target that ends in .pt")
def a_dtype_that_the_format_of_the_target_lacks(bed: Bed) -> None:
    bed.model.register_buffer("spectrum", torch.zeros(2, dtype=torch.complex128))
    bed.move(bed.saved())


# torch.distributed.checkpoint


@refused("nothing of it was run", "save the checkpoint again")
def hostile_metadata(bed: Bed) -> None:
    (bed.distributed() / ".metadata").write_bytes(pickle.dumps(Unsafe()))
    bed.move("in", "out")


@refused("describes no state dict", "save the checkpoint by dcp.save")
def metadata_of_something_else(bed: Bed) -> None:
    (bed.distributed() / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    bed.move("in", "out")


@refused("is damaged", "copy the folder again, or save it again")
def damaged_metadata(bed: Bed) -> None:
    bed.described(lambda m: setattr(m.state_dict_metadata["0.weight"], "properties", None))


@refused("no place in a state dict", "save it again")
def a_tensor_without_a_place(bed: Bed) -> None:
    bed.described(lambda m: setattr(m, "planner_data", {"0.weight": ()}))


@refused("inside another entry", "save it again")
def a_tensor_inside_another(bed: Bed) -> None:
    places = {n: (n,) for n in bed.state} | {"0.bias": ("0.weight", "bias")}
    bed.described(lambda m: setattr(m, "planner_data", places))


@refused("no file of that folder itself", "copy all parts into it")
def a_part_outside_the_folder(bed: Bed) -> None:
    bed.described(lambda m: [setattr(i, "relative_path", "../out.distcp") for i in m.storage_data.values()])


@refused("does not say where", "was the save finished? Save it again")
def a_tensor_that_lies_nowhere(bed: Bed) -> None:
    bed.described(lambda m: m.storage_data.clear())


@refused("stream transforms ['zstd']", "save it again without extensions")
def a_compressed_part(bed: Bed) -> None:
    bed.described(lambda m: [setattr(i, "transform_descriptors", ["zstd"]) for i in m.storage_data.values()])


@refused("do not make up its shape", "Save it again")
def pieces_of_a_process_that_are_missing(bed: Bed) -> None:
    bed.described(lambda m: setattr(m.state_dict_metadata["0.weight"], "size", torch.Size([16, 6])))


@refused("the metadata says", "copy the folder again")
def a_piece_of_another_dtype(bed: Bed) -> None:
    bed.described(lambda m: setattr(m.state_dict_metadata["0.weight"].properties, "dtype", torch.float32))


@refused("is missing", "copy all parts here")
def a_missing_part(bed: Bed) -> None:
    (bed.distributed() / "__0_0.distcp").unlink()
    bed.move("in", "out")


@refused("is cut off", "copy it again")
def a_part_cut_off(bed: Bed) -> None:
    part = bed.distributed() / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:200])
    bed.move("in", "out")


@refused("one file of a torch.distributed.checkpoint", "name the folder")
def a_lone_part(bed: Bed) -> None:
    bed.distributed()
    bed.move("in/__0_0.distcp")


@refused("no .metadata, which is written last", "copy it here")
def parts_without_their_metadata(bed: Bed) -> None:
    (bed.distributed() / ".metadata").unlink()
    bed.move("in", "out")


@refused("every process described its own part", "dcp.save(..., storage_writer=FileSystemWriter(path))")
def metadata_of_every_process(bed: Bed) -> None:
    (bed.distributed() / ".metadata").rename(bed.folder / "in" / "__0.metadata")
    bed.move("in", "out")


@refused("name the one of the folders in it (in, other)")
def two_distributed_checkpoints_in_a_folder(bed: Bed) -> None:
    bed.distributed("both/in")
    bed.distributed("both/other")
    bed.move("both", "out")


@refused("holds its weights twice", "keep one of them")
def parts_beside_a_safetensors_file(bed: Bed) -> None:
    bed.tensors({}, f"{bed.distributed().name}/model.safetensors")
    bed.move("in", "out")


# proof


def least_norm(model: nn.Module, syms: Any = None) -> Any:
    syms = nf.find_symmetries(model, torch.zeros(2, 6).double()) if syms is None else syms
    return nf.noise_equilibrium(model, syms, None, objective="norm")


@refused("pass example_inputs", "certificate=nf.certify(model, syms, example_inputs)", "unchecked=True")
def nothing_that_proves_the_move(bed: Bed) -> None:
    bed.move(bed.saved(), unchecked=False)


@refused("leave example_inputs out", "pass certificate= of a model with weights, or unchecked=True")
def outputs_of_a_model_without_memory(bed: Bed) -> None:
    bed.move(bed.saved(), model=bed.outline(), example_inputs=torch.zeros(2, 6).double())


@refused("more than the tolerance", "Certify the symmetries (nf.certify)", "or pass tolerance=")
def outputs_that_change(bed: Bed) -> None:
    wrong = nf.declare(bed.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    bed.move(bed.saved(), eq=least_norm(bed.model, wrong), example_inputs=torch.randn(5, 6).double())


@refused("broken", "drop them (syms.without) before solving")
def a_symmetry_that_a_certificate_calls_broken(bed: Bed) -> None:
    wrong = nf.declare(bed.model, "diagonal", [("0.weight", 0)], [("2.weight", 1)])
    proof = nf.certify(bed.model, wrong, torch.randn(5, 6).double())
    bed.move(bed.saved(), eq=least_norm(bed.model, wrong), certificate=proof)


@refused("load the checkpoint into one with weights (nf.load_checkpoint_), or use positive scales")
def negative_scales_without_memory(bed: Bed) -> None:
    syms = bed.eq.symmetries
    paths = bed.folder / bed.saved(), bed.folder / "out.pt"
    nf.move_checkpoint(*paths, bed.outline(), syms, {syms[0].name: -torch.ones(8)})


@refused("needs gradients", "norm and range need none")
def an_objective_that_files_do_not_determine(bed: Bed) -> None:
    nf.stored_equilibrium(bed.folder / bed.saved(), bed.outline(), bed.eq.symmetries, objective="noise")


@refused("balance the weights alone, and begin with a fresh optimiser")
def momenta_that_are_no_numbers(bed: Bed) -> None:
    optimizer = torch.optim.Adam(bed.model.named_parameters())
    bed.model(torch.ones(2, 6).double()).sum().backward()
    optimizer.step()
    optimizer.state[bed.model[0].weight]["exp_avg"][0, 0] = float("nan")
    eq = least_norm(bed.model, bed.eq.symmetries)
    bed.move(bed.saved({"model": bed.state, "optimizer": optimizer.state_dict()}), "out.pt", eq=eq)


# whose state it is


@stays("by position alone", "state_order='parameters' (--state-order parameters)", "optimizer=", "named_parameters()")
def state_of_twins_by_position(bed: Bed) -> Any:
    model, optimizer, eq = trained_twins("model")
    bed.saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return bed.move("a.pt", "out.pt", model=model, eq=eq)


@stays("only when they are exchanged", "optimizer=", "build it from model.named_parameters()")
def state_in_an_order_that_the_momenta_contradict(bed: Bed) -> Any:
    model, optimizer, eq = trained_twins("swapped")
    bed.saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return bed.move("a.pt", "out.pt", model=model, eq=eq, state_order="parameters")


@stays("none of the optimisers given", "give those whose state it is")
def the_optimiser_of_another_run(bed: Bed) -> Any:
    model, optimizer, eq = trained_twins("model")
    bed.saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
    return bed.move("a.pt", "out.pt", model=model, eq=eq, optimizer=other)


@stays("names are not the model's")
def names_of_another_model(bed: Bed) -> Any:
    model, optimizer, eq = trained_twins("named")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [f"other.{k}" for k in range(8)]
    bed.saved({"model": model.state_dict(), "optimizer": saved})
    return bed.move("a.pt", "out.pt", model=model, eq=eq)


@stays("optimizer.pt beside", "balance the folder")
def an_optimiser_beside_the_file_that_moves(bed: Bed) -> Any:
    optimizer = torch.optim.SGD(bed.model.parameters(), lr=0.1, momentum=0.9)
    bed.model(torch.ones(2, 6).double()).sum().backward()
    optimizer.step()
    (bed.folder / "in").mkdir()
    bed.tensors({}, "in/model.safetensors")
    bed.saved(optimizer.state_dict(), "in/optimizer.pt")
    return bed.move("in/model.safetensors", eq=least_norm(bed.model, bed.eq.symmetries))


@dataclass
class Tried:
    """What came of a situation: the error or the report's lines, and where the error was raised."""

    text: str
    raised: list[tuple[str, int]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def tried(refusal: Refusal, folder: Path) -> Tried:
    folder.mkdir()
    problem = mlp(scales=(4, 0.5, 1))
    with pytest.MonkeyPatch.context() as patch:
        bed = Bed(folder, problem.model, least_norm(problem.model, problem.syms), patch)
        try:
            report = refusal.attempt(bed)
        except NoetherflowError as error:
            out = Tried(" ".join(str(error).split()), list(_places(error)))
        else:
            out = Tried("\n".join(getattr(report, "unmoved", ("nothing was refused",))))
    out.left = [p.name for p in folder.iterdir() if p.name.startswith((".", "out"))]
    return out


def _places(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """File and line of each frame in the folder of checkpoints, of an error and its causes."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            path = Path(trace.tb_frame.f_code.co_filename)
            if path.parent == BALANCE:
                yield path.name, trace.tb_lineno
            trace = trace.tb_next
        error = error.__cause__


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tried]:
    folder = tmp_path_factory.mktemp("refusals")
    return {name: tried(refusal, folder / name) for name, refusal in (TABLE | STAYS).items()}


@pytest.mark.parametrize("name", TABLE)
def test_a_refusal_tells_the_remedy_and_writes_nothing(outcomes: dict[str, Tried], name: str) -> None:
    found = outcomes[name]
    for words in TABLE[name].remedy:
        assert words in found.text, found.text
    assert found.left == []


@pytest.mark.parametrize("name", STAYS)
def test_state_that_stays_is_listed_with_the_remedy(outcomes: dict[str, Tried], name: str) -> None:
    for words in STAYS[name].remedy:
        assert words in outcomes[name].text, outcomes[name].text


ELSEWHERE = {
    "run_files.py": "read by `noetherflow flow`: tests/test_run_files.py",
    "state_naming.py": "state that stays: the second table",
}


def test_the_table_is_complete(outcomes: dict[str, Tried]) -> None:
    """Every line that raises a CheckpointError where checkpoints are balanced was reached by a row."""
    reached = {place for found in outcomes.values() for place in found.raised}
    missed = []
    for path in sorted(BALANCE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            own = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
            if own and getattr(node.exc.func, "id", "") == "CheckpointError" and path.name not in ELSEWHERE:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                if not any((path.name, line) in reached for line in lines):
                    missed.append(f"{path.name}:{node.lineno}")
    assert missed == []
