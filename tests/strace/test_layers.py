"""Layers that are made when asked for: the same model, of which no more than two layers are ever held."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from strace import layers
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.controls import score_units
from strace.decoder import Decoder, DenseAttend, Layer
from strace.distill import map_linears
from strace.flow import measure_flow
from strace.graphs import make_runner
from strace.head import measure_mass
from strace.keep import Plan, keep_units, slice_decoder
from strace.layers import Layers
from strace.linear import Linear
from strace.measure import measure_acceptance
from strace.repair import repair
from strace.runner import FULL
from strace.search import list_shapes
from strace.subgraph import collect_tensors, restore_tensors, save_tensors
from strace.texts import batch_texts
from tests.tiny import KINDS, random_tokens, save_tiny

TEXTS = batch_texts([random_tokens(n, seed=n).tolist() for n in (40, 33, 21)])


def load(folder: Path, family: str = "llama", streamed: bool = False) -> Decoder:
    return load_decoder(open_checkpoint(str(save_tiny(folder, family))), streamed=streamed)


def run(decoder: Decoder) -> torch.Tensor:
    [batch] = TEXTS
    stream = decoder.streams(batch.tokens.flatten(), batch.positions, DenseAttend(*batch.shape))
    return decoder.logits(stream)


@pytest.mark.parametrize("room", [0, 100_000, None])
@pytest.mark.parametrize("family", KINDS)
def test_a_streamed_model_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, room: int | None
) -> None:
    monkeypatch.setattr(layers, "ROOM", layers.ROOM if room is None else room)
    whole, streamed = load(tmp_path, family), load(tmp_path, family, streamed=True)
    assert torch.equal(run(streamed), run(whole))
    assert streamed.bytes_per_step == whole.bytes_per_step
    assert [len(streamed.layers), len(streamed.layers[1:])] == [3, 2]
    assert streamed.layers[-1].bytes == whole.layers[-1].bytes
    with pytest.raises(IndexError):
        streamed.layers[3]


def test_the_first_layers_stay_while_there_is_room_and_of_the_others_the_last(tmp_path: Path) -> None:
    whole, made = load(tmp_path).layers, list[int]()

    def make(l: int) -> Layer:
        made.append(l)
        return replace(whole[l])

    some = Layers(3, make, room=2 * whole[0].bytes)
    with torch.inference_mode():
        for _ in range(3):
            assert [layer.bytes for layer in some] == [layer.bytes for layer in whole]
    assert some[0] is some[0]
    assert some[2] is some[2]
    assert [made.count(l) for l in range(3)] == [1, 1, 4]
    assert some.peek(1) is some[1]
    assert some.peek(2) is not some.peek(2)


class Counted:
    """A model whose layers are copied when asked for, and how many were held together at most."""

    def __init__(self, full: Decoder) -> None:
        self.most, self._made = 0, list[weakref.ref[torch.Tensor]]()
        self._full = full
        self.decoder = replace(full, layers=Layers(len(full.layers), self._copy, room=0))

    def _copy(self, l: int) -> Layer:
        self._made = [each for each in self._made if each() is not None]

        def copy(linear: Linear) -> Linear:
            weight = linear.dense().to(self._full.dtype, copy=True)
            self._made.append(weakref.ref(weight))
            return Linear(weight, linear.bias)

        [layer] = map_linears(replace(self._full, layers=[self._full.layers[l]]), copy).layers
        self._made.pop()  # the head's
        self.most = max(self.most, len(self._made))
        return layer


def score(full: Decoder, folder: Path) -> None:
    score_units("refit", measure_flow(full, TEXTS), full, TEXTS)
    measure_mass(full, TEXTS)


def fit(full: Decoder, folder: Path) -> None:
    flow = measure_flow(full, TEXTS)
    kept = keep_units(flow, Plan("part", 0.5, 0.5))
    save_tensors(folder / "part.safetensors", repair(full, kept, "int4", TEXTS, TEXTS), kept)
    restored = restore_tensors(folder / "part.safetensors", kept, full)
    assert restored is not None
    measure_acceptance(full, restored, TEXTS)


def round_plainly(full: Decoder, folder: Path) -> None:
    kept = keep_units(measure_flow(full, TEXTS), Plan("all"))
    measure_acceptance(full, quantise_decoder(slice_decoder(full, kept), "int8"), TEXTS)


def pack(full: Decoder, folder: Path) -> None:
    make_runner({FULL: full, **list_shapes(full, "int4")}, 4, "native")


@pytest.mark.parametrize("work", [score, fit, round_plainly, pack])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_no_more_than_two_layers_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, work: Callable[[Decoder, Path], None]
) -> None:
    monkeypatch.setattr(layers, "ROOM", 0)
    counted = Counted(load(tmp_path, family))
    work(counted.decoder, tmp_path)
    assert 4 <= counted.most <= 2 * 4  # matrices of a layer


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_what_is_fitted_to_a_streamed_model_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr(layers, "ROOM", 0)
    whole, streamed = load(tmp_path), load(tmp_path, streamed=True)
    flows = [measure_flow(full, TEXTS) for full in (whole, streamed)]
    assert torch.equal(flows[0].neurons, flows[1].neurons)
    scores = [score_units("refit", flow, full, TEXTS) for flow, full in zip(flows, (whole, streamed), strict=True)]
    assert torch.equal(scores[0].neurons, scores[1].neurons)
    kept = keep_units(scores[0], Plan("part", 0.5, 0.5))
    wanted, found = (collect_tensors(repair(full, kept, format, TEXTS, TEXTS), kept) for full in (whole, streamed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


PEAK = """
import sys
from pathlib import Path
from strace import flow, layers, trace as pipeline
from strace.keep import Plan
from strace.search import StepCosts
from strace.trace import Options, trace

folder = Path(sys.argv[1])
cheap = StepCosts((0.0, 0.0, 1e-9), {1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, "a clock of ours")
pipeline.price_steps, pipeline.WRITTEN = lambda *_: cheap, 4
split = pipeline.split_classes
pipeline.split_classes = lambda *given: {"letters": split(*given)["letters"]}  # pooled would be the same again
pipeline.plan_candidates = lambda *_: [Plan("part", mlp=0.5, coverage=0.9, format="int8")]
flow.STREAMS = layers.ROOM = 0
trace(Options(str(folder / "model"), folder / "out", folder / "letters.jsonl", class_name="letters"), lambda line: None)
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(1024 * int(peak))
"""


def measure_peak(folder: Path, depth: int) -> tuple[int, int]:
    """Bytes of a model's weights, and the most memory that tracing it takes."""
    sizes = {"num_hidden_layers": depth, "hidden_size": 512, "intermediate_size": 512, "head_dim": 128}
    model = save_tiny(folder / "model", **sizes)
    rng = np.random.default_rng(0)
    lines = [{"text": "".join(rng.choice(list("abcdefgh "), 70)), "source": str(i)} for i in range(12)]
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_decoder(open_checkpoint(str(model))).bytes_per_step, int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells the peak")
def test_more_layers_take_no_more_memory_than_their_weights(tmp_path: Path) -> None:
    (few, low), (many, high) = (measure_peak(tmp_path / str(depth), depth) for depth in (2, 18))
    assert many - few > 45e6
    # Packed weights and the cache that continues prompts grow with the layers, and malloc keeps some of what is freed.
    # Layers that hold on to the file they were read from, which is in float32, take twice the weights more.
    assert high - low < 5 * (many - few)
