"""A model as ONNX: its graphs, built from the weights, and the folder that holds them.

The folder has a `model.json`, the same description as a model file's header (`lewm.model_file`) and, as `onnx`, the
opset and the SHA-256 of each graph; and these, in opset 17 of the standard operators, float32, the batch B dynamic:

    encoder.onnx        frames (B, S, S, 3) uint8 RGB -> latents (B, D); pixels are normalised in the graph
    predictor.onnx      latents (B, T, D), blocks (B, T, A) normalised actions -> next (B, D); T from 1 to `history`,
                        oldest first, block t is executed from latent t on
    distance_head.onnx  latents (N, D) -> embedded (N, D), whose Euclidean distances are action blocks
    action_prior.onnx   latents (B, D), goals (B, D) -> blocks (B, P, A)

The last two are there if the model has those heads. The predictor of an action-prefix model takes the current latent,
(B, 1, D), with the next W blocks, (B, W, A), W from 1 to `prefix_blocks`, and gives where every prefix of them leads,
(B, W, D). Every parameter is an initializer under its official name in its official shape, so that the folder is a
model like any other: `lewm.load` reads it. What it takes from a file are those tensors, and it refuses a graph that is
not the one that this module builds of them; no graph from elsewhere is ever run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lewm.config import ModelConfig
from lewm.model_file import Read, brief, described, described_model
from lewm.pixels import MEAN, STD

OPSET = 17
DESCRIPTION = "model.json"
_IR = 8  # the release of the file format that came with that opset
_LARGEST = 2**31 - 2**20  # a file is one protobuf message, whose length is an int32
_LARGEST_DESCRIPTION = 16 * 2**20
_COUNT = ".num_batches_tracked"


def graphs(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The `onnx.ModelProto` of each graph, by its name: "encoder", "predictor" and those of the heads it has.

    The same weights give the same bytes.

    Raises:
        ModuleNotFoundError: onnx is not installed.
        ValueError: The weights are too large for one file of that format.
    """
    made = {"encoder": _encoder, "predictor": _predictor}
    made |= {name: make for name, make in _HEADS.items() if getattr(config, name)}
    return {name: make(config, weights) for name, make in made.items()}


def write(
    folder: str | os.PathLike[str],
    weights: dict[str, np.ndarray],
    config: ModelConfig,
    stats: dict[str, np.ndarray] | None,
    meta: dict[str, Any],
) -> None:
    """Writes the folder of the module's docstring; it is whole or absent.

    Raises:
        FileExistsError: There is something under that name that is not an empty folder.
        ModuleNotFoundError: onnx is not installed.
        ValueError: The weights are too large for the format.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: an ONNX model is written as a new folder")
    made = graphs(config, weights)
    contents = {name: graph.SerializeToString(deterministic=True) for name, graph in made.items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    description = {**described(config, stats, meta), "onnx": {"opset": OPSET, "graphs": sums}}
    contents = {f"{name}.onnx": content for name, content in contents.items()}
    contents[DESCRIPTION] = json.dumps(description, indent=2).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in contents.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(folder: Path) -> Read:
    """Weights, configuration, action statistics and the rest of the description of such a folder.

    Raises:
        ModuleNotFoundError: onnx is not installed.
        ValueError: A file is missing or damaged, is not as this release writes it, or does not fit the others.
    """
    header = _description(folder / DESCRIPTION)
    listed = header.pop("onnx", None)
    sums = listed.get("graphs") if isinstance(listed, dict) else None
    if not isinstance(sums, dict) or not set(sums) <= {"encoder", "predictor", *_HEADS}:
        raise ValueError(f"model file: {folder / DESCRIPTION} lists no graphs of a LeWorldModel, got {brief(listed)}")
    found = {name: _parsed(folder / f"{name}.onnx", checksum) for name, checksum in sums.items()}
    weights: dict[str, np.ndarray] = {}
    for name, graph in found.items():
        try:
            weights |= _weights(graph)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"model file: {folder / name}.onnx is not one of lewm's ({brief(error)})") from None
    read = described_model(folder / DESCRIPTION, weights, header)
    want = graphs(read[1], read[0])
    wrong = [name for name in want if name not in found or found[name] != want[name]]
    if wrong:
        raise ValueError(
            f"model file: {folder} holds other graphs than lewm writes for these weights ({', '.join(wrong)})"
        )
    return read


def _description(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read(_LARGEST_DESCRIPTION + 1)
    try:
        if len(content) > _LARGEST_DESCRIPTION:
            raise ValueError("it is larger than 16 MiB")
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model file: {path} is not JSON of lewm ({brief(error)})") from None
    if not isinstance(description, dict):
        raise ValueError(f"model file: {path} is not JSON of lewm (it holds a {type(description).__name__})")
    return description


def _parsed(path: Path, checksum: Any) -> Any:
    """The message in a file. Other files that it may name are left alone."""
    onnx = _onnx()
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ValueError(f"model file: {path.parent / DESCRIPTION} lists {path.name}, and there is no such file")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(
            f"model file: {path} is damaged, or another program changed it: its SHA-256 is not the one in "
            f"{DESCRIPTION}; what another program changed is run with onnxruntime itself"
        )
    try:
        return onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ValueError(f"model file: {path} is no ONNX file ({brief(error)})") from None


def _weights(graph: Any) -> dict[str, np.ndarray]:
    """The model's tensors in a graph, as `_Graph` put them there."""
    onnx = _onnx()
    weights = {}
    for tensor in graph.graph.initializer:
        if "." not in tensor.name:  # a constant
            continue
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.external_data or tensor.data_location:
            raise ValueError(f"{brief(tensor.name)} is no float32 tensor that is in the file itself")
        weights[tensor.name] = np.frombuffer(tensor.raw_data, "<f4").reshape(tuple(tensor.dims))
    for entry in graph.metadata_props:
        if entry.key.endswith(_COUNT):
            weights[entry.key] = np.array(int(entry.value), np.int64)
    return weights


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        text = f'ONNX needs {error.name}: pip install "lewm-fast[onnx]"'
        raise ModuleNotFoundError(text, name=error.name) from error
    return onnx


# -------------------------------------------------------------------------------------------------------------- graphs


class _Graph:
    """A graph as it grows: a call adds an operator and gives the name of its (first) output."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self._onnx = _onnx()
        self._weights = weights
        self._nodes: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._counts: dict[str, str] = {}

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        name = f"{operator}_{len(self._nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, names, name, **attributes))
        return name if outputs == 1 else names

    def weight(self, name: str) -> str:
        if name not in self._tensors:
            self._store(name, np.asarray(self._weights[name]).astype("<f4"))
        return name

    def constant(self, value: Any, kind: str = "<f4") -> str:
        array = np.asarray(value, kind)
        name = f"constant_{len(self._tensors)}"
        self._store(name, array)
        return name

    def _store(self, name: str, array: np.ndarray) -> None:
        types = self._onnx.TensorProto
        kind = types.FLOAT if array.dtype.kind == "f" else types.INT64
        self._tensors[name] = self._onnx.helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)

    def linear(self, x: str, name: str, bias: bool = True) -> str:
        product = self("MatMul", x, self("Transpose", self.weight(f"{name}.weight"), perm=[1, 0]))
        return self("Add", product, self.weight(f"{name}.bias")) if bias else product

    def norm(self, x: str, name: str, epsilon: float) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def gelu(self, x: str) -> str:
        erf = self("Erf", self("Div", x, self.constant(math.sqrt(2))))
        return self("Mul", self("Mul", x, self("Add", erf, self.constant(1))), self.constant(0.5))

    def silu(self, x: str) -> str:
        return self("Mul", x, self("Sigmoid", x))

    def attention(self, q: str, k: str, v: str, heads: int, width: int, mask: str | None = None) -> str:
        """(B, Q, heads * width), (B, K, ...), (B, K, ...) -> (B, Q, heads * width)"""
        split = self.constant([0, 0, heads, width], "<i8")
        q, v = (self("Transpose", self("Reshape", x, split), perm=[0, 2, 1, 3]) for x in (q, v))
        k = self("Transpose", self("Reshape", k, split), perm=[0, 2, 3, 1])
        scores = self("Mul", self("MatMul", q, k), self.constant(width**-0.5))
        if mask is not None:
            scores = self("Add", scores, mask)
        out = self("Transpose", self("MatMul", self("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self("Reshape", out, self.constant([0, 0, heads * width], "<i8"))

    def slice(self, x: str, start: int, end: int | str, axis: int) -> str:
        end = self.constant([end], "<i8") if isinstance(end, int) else end
        return self("Slice", x, self.constant([start], "<i8"), end, self.constant([axis], "<i8"))

    def projector(self, x: str, name: str) -> str:
        """Rows (N, inputs) -> (N, D)."""
        x = self.linear(x, f"{name}.net.0")
        parts = ("weight", "bias", "running_mean", "running_var")
        x = self("BatchNormalization", x, *(self.weight(f"{name}.net.1.{part}") for part in parts), epsilon=1e-5)
        count = f"{name}.net.1{_COUNT}"  # no operator uses it, and an unused initializer is warned of
        self._counts[count] = str(int(self._weights[count]))
        return self.linear(self.gelu(x), f"{name}.net.3")

    def head(self, x: str, name: str) -> str:
        for layer in (0, 2):
            x = self.gelu(self.linear(x, f"{name}.net.{layer}"))
        return self.linear(x, f"{name}.net.4")

    def model(self, name: str, inputs: dict[str, tuple], output: str, shape: tuple) -> Any:
        """The finished model, whose one output is what the last operator gave, under the name `output`."""
        helper, types = self._onnx.helper, self._onnx.TensorProto
        size = sum(len(tensor.raw_data) for tensor in self._tensors.values())
        if size > _LARGEST:
            raise ValueError(f"an ONNX file holds less than 2 GiB, the {name} of this model has {size} bytes")
        self._nodes[-1].output[0] = output
        graph = helper.make_graph(
            self._nodes,
            name,
            [
                helper.make_tensor_value_info(key, types.UINT8 if key == "frames" else types.FLOAT, axes)
                for key, axes in inputs.items()
            ],
            [helper.make_tensor_value_info(output, types.FLOAT, shape)],
            list(self._tensors.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR, producer_name="lewm-fast"
        )
        helper.set_model_props(model, dict(sorted(self._counts.items())))
        return model


def _encoder(c: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    g = _Graph(weights)
    embeddings, epsilon = "encoder.embeddings", 1e-12
    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    x = g("Div", g("Sub", g("Cast", "frames", to=1), g.constant(mean)), g.constant(std))
    projection = f"{embeddings}.patch_embeddings.projection"
    kernel = [c.patch_size, c.patch_size]
    parts = (g.weight(f"{projection}.weight"), g.weight(f"{projection}.bias"))
    x = g("Conv", g("Transpose", x, perm=[0, 3, 1, 2]), *parts, kernel_shape=kernel, strides=kernel)
    x = g("Transpose", g("Reshape", x, g.constant([0, c.encoder_dim, -1], "<i8")), perm=[0, 2, 1])
    batch = g("Shape", "frames", start=0, end=1)
    shape = g("Concat", batch, g.constant([1, c.encoder_dim], "<i8"), axis=0)
    x = g("Concat", g("Expand", g.weight(f"{embeddings}.cls_token"), shape), x, axis=1)
    x = g("Add", x, g.weight(f"{embeddings}.position_embeddings"))
    for i in range(c.encoder_depth):
        layer = f"encoder.layers.{i}"
        normed = queries = g.norm(x, f"{layer}.layernorm_before", epsilon)
        if i == c.encoder_depth - 1:  # only [CLS] leaves the encoder
            x, queries = g.slice(x, 0, 1, 1), g.slice(normed, 0, 1, 1)
        q = g.linear(queries, f"{layer}.attention.q_proj")
        k, v = (g.linear(normed, f"{layer}.attention.{part}_proj") for part in ("k", "v"))
        out = g.attention(q, k, v, c.encoder_heads, c.encoder_dim // c.encoder_heads)
        x = g("Add", x, g.linear(out, f"{layer}.attention.o_proj"))
        out = g.gelu(g.linear(g.norm(x, f"{layer}.layernorm_after", epsilon), f"{layer}.mlp.fc1"))
        x = g("Add", x, g.linear(out, f"{layer}.mlp.fc2"))
    x = g.norm(g("Gather", x, g.constant(0, "<i8"), axis=1), "encoder.layernorm", epsilon)
    g.projector(x, "projector")
    side = c.image_size
    return g.model("encoder", {"frames": ("B", side, side, 3)}, "latents", ("B", c.embed_dim))


def _predictor(c: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    g = _Graph(weights)
    transformer, p = "predictor.transformer", c.predictor_dim
    epsilon = 1e-5
    tokens = g("Shape", "blocks", start=1, end=2)

    weight = g("Squeeze", g.weight("action_encoder.patch_embed.weight"), g.constant([2], "<i8"))
    condition = g("MatMul", "blocks", g("Transpose", weight, perm=[1, 0]))
    condition = g("Add", condition, g.weight("action_encoder.patch_embed.bias"))
    condition = g.silu(g.linear(condition, "action_encoder.embed.0"))
    condition = g.linear(condition, "action_encoder.embed.2")

    # Of an action-prefix model one latent, which stands beside every prefix.
    x = g("Add", "latents", g.slice(g.weight("predictor.pos_embedding"), 0, tokens, 1))
    mask = None
    if c.positions > 1:
        # Far below any score and within reach of float32: what is masked weighs exactly nothing.
        mask = g.constant(np.triu(np.full((c.positions, c.positions), -1e9), 1))
        mask = g.slice(g.slice(mask, 0, tokens, 0), 0, tokens, 1)
    if c.embed_dim != p:
        x, condition = g.linear(x, f"{transformer}.input_proj"), g.linear(condition, f"{transformer}.cond_proj")
    condition, one, ones = g.silu(condition), g.constant(1), g.constant(np.ones(p))

    def modulated(x: str, shift: str, scale: str) -> str:
        normed = g("LayerNormalization", x, ones, axis=-1, epsilon=1e-6)
        return g("Add", g("Mul", normed, g("Add", scale, one)), shift)

    for i in range(c.predictor_depth):
        layer = f"{transformer}.layers.{i}"
        parts = g("Split", g.linear(condition, f"{layer}.adaLN_modulation.1"), outputs=6, axis=-1)
        out = g.norm(modulated(x, *parts[:2]), f"{layer}.attn.norm", epsilon)
        q, k, v = g("Split", g.linear(out, f"{layer}.attn.to_qkv", bias=False), outputs=3, axis=-1)
        # A single key weighs 1 whatever the scores.
        out = v if mask is None else g.attention(q, k, v, c.predictor_heads, c.predictor_head_dim, mask)
        x = g("Add", x, g("Mul", parts[2], g.linear(out, f"{layer}.attn.to_out.0")))
        out = g.norm(modulated(x, *parts[3:5]), f"{layer}.mlp.net.0", epsilon)
        out = g.linear(g.gelu(g.linear(out, f"{layer}.mlp.net.1")), f"{layer}.mlp.net.4")
        x = g("Add", x, g("Mul", parts[5], out))
    if c.action_prefix:
        x = g("Reshape", x, g.constant([-1, p], "<i8"))
    else:
        x = g("Gather", x, g.constant(-1, "<i8"), axis=1)
    x = g.norm(x, f"{transformer}.norm", epsilon)
    if c.embed_dim != p:
        x = g.linear(x, f"{transformer}.output_proj")
    x = g.projector(x, "pred_proj")
    if c.action_prefix:
        batch = g("Shape", "blocks", start=0, end=1)
        g("Reshape", x, g("Concat", batch, tokens, g.constant([c.embed_dim], "<i8"), axis=0))
    axis = "T" if c.positions > 1 else 1
    inputs = {"latents": ("B", 1 if c.action_prefix else axis, c.embed_dim), "blocks": ("B", axis, c.block_dim)}
    return g.model("predictor", inputs, "next", ("B", axis, c.embed_dim) if c.action_prefix else ("B", c.embed_dim))


def _distance_head(c: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    g = _Graph(weights)
    g.head("latents", "distance_head")
    return g.model("distance_head", {"latents": ("N", c.embed_dim)}, "embedded", ("N", c.embed_dim))


def _action_prior(c: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    g = _Graph(weights)
    out = g.head(g("Concat", "latents", "goals", axis=-1), "action_prior")
    g("Reshape", out, g.constant([-1, c.prior_blocks, c.block_dim], "<i8"))
    row = ("B", c.embed_dim)
    return g.model("action_prior", {"latents": row, "goals": row}, "blocks", ("B", c.prior_blocks, c.block_dim))


_HEADS = {"distance_head": _distance_head, "action_prior": _action_prior}
