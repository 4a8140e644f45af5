"""Official checkpoints: those of le-wm and stable-worldmodel, from a disk or the Hugging Face Hub, and writing them.

Such a checkpoint is a state dict that torch pickled (`weights.pt`), with a `config.json` beside it. Nothing of either
is executed: the pickle is read by torch's unpickler for plain tensors, and of the JSON three numbers are used, of
heads. All else that makes the architecture is in the shapes of the tensors; what is in none of them, the statistics of
the actions, is asked for where it is needed (`lewm.load(..., stats=...)`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lewm import onnx_graphs
from lewm.config import PRESETS, ModelConfig
from lewm.model_file import (
    Read,
    brief,
    check_values,
    check_weights,
    current_names,
    described_model,
    read_safetensors,
    released_names,
    write_atomically,
)

# What a folder or a repository may hold, the first that is there.
_NAMES = ("model.safetensors", "weights.safetensors", "weights.pt")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The width of a head in the ViTs of transformers and in the official predictor; shapes do not tell it.
_HEAD = 64


def located(src: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The file of a model: `src` itself, the one in the folder `src`, or the one of a repository, downloaded.

    Raises:
        FileNotFoundError: There is none.
        ConnectionError: It is to be downloaded, and cannot be.
        ValueError: A folder holds several, or what was downloaded is damaged.
    """
    path = Path(src)
    if not path.exists() and _REPOSITORY.fullmatch(os.fspath(src)) and path.suffix not in (".safetensors", *_PICKLES):
        return _downloaded(os.fspath(src), revision)
    if revision is not None:
        raise ValueError(f"revision is for repositories of the Hugging Face Hub, got {revision!r} for {path}")
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"model file: no such file: {path}")
        return path
    for name in (*_NAMES, onnx_graphs.DESCRIPTION):
        if (path / name).is_file():
            return path / name
    found = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES and file.is_file())
    if len(found) == 1:
        return path / found[0]
    listed = f": {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else ""
    problem = "several, name the one" if found else f"none of {', '.join(_NAMES)}"
    error = ValueError if found else FileNotFoundError
    raise error(f"model file: {path} is a folder with {problem}{listed}")


def read(path: Path, action_dim: int | None) -> Read:
    """Weights, configuration, action statistics and the rest of the header of a model file or an official checkpoint.

    Args:
        path: The file; of an ONNX model its `model.json`.
        action_dim: Width of a raw action, which official checkpoints do not tell; a fifth of a block when not given.

    Raises:
        ValueError: It is neither, or does not fit together.
    """
    if path.name == onnx_graphs.DESCRIPTION:
        return onnx_graphs.read(path.parent)
    if path.suffix == ".onnx":
        raise ValueError(f"model file: {path} is one graph of an ONNX model: name the folder, {path.parent}")
    if path.suffix in _PICKLES:
        tensors = _unpickled(path)
    else:
        tensors, header = read_safetensors(path, "model file")
        if header is not None:
            return described_model(path, tensors, header)
    try:
        weights = current_names(_own(tensors))
        config = architecture(weights, _heads(path.parent / "config.json"), action_dim)
        check_weights(config, weights)
        check_values(weights)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model file: {path} is no checkpoint of a LeWorldModel ({brief(error)})") from None
    official = dataclasses.asdict(config) == dataclasses.asdict(ModelConfig(action_dim=config.action_dim))
    meta: dict[str, Any] = {"planner": PRESETS["paper"].planner}
    return weights, config, None, {"preset": "paper", **meta} if official else meta


def write(
    folder: str | os.PathLike[str], weights: dict[str, np.ndarray], config: ModelConfig, transformers: int
) -> None:
    """Writes `weights.pt` and `config.json`, as stable-worldmodel's `load_pretrained` and le-wm's README read them.

    Raises:
        ModuleNotFoundError: torch is not installed, whose format the weights are in.
        ValueError: The official code cannot hold this architecture, or knows no such release of transformers.
    """
    c = config
    extras = [name for name in ("distance_head", "action_prior", "action_prefix") if getattr(c, name)]
    if extras:
        raise ValueError(f"the official code has no {' and no '.join(extras)}: such a model cannot be exported to it")
    if c.action_hidden % c.embed_dim:
        raise ValueError(
            f"the official code wants an action_hidden that is a multiple of embed_dim {c.embed_dim}, this model has "
            f"{c.action_hidden}"
        )
    if c.predictor_heads == 1 and c.predictor_head_dim == c.predictor_dim:
        raise ValueError("the official code has no output projection for a single head as wide as its predictor")
    if transformers not in (4, 5):
        raise ValueError(f"transformers must be 4 or 5, the major release that is to load it, got {transformers!r}")
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'an official checkpoint is a file of {error.name}\'s: pip install "lewm-fast[train]"'
        ) from error

    folder = Path(folder)
    named = released_names(weights) if transformers == 4 else weights
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in named.items()}, content)
    write_atomically(folder / "config.json", json.dumps(_described(config), indent=2).encode())
    write_atomically(folder / "weights.pt", content.getvalue())


def _described(c: ModelConfig) -> dict[str, Any]:
    """`config.json`: which classes of the peer to make, with what arguments."""
    lewm = "stable_worldmodel.wm.lewm"

    def projector(inputs: int) -> dict[str, Any]:
        norm = {"_target_": "torch.nn.BatchNorm1d", "_partial_": True}
        sizes = {"input_dim": inputs, "output_dim": c.embed_dim, "hidden_dim": c.projector_hidden}
        return {"_target_": f"{lewm}.module.MLP", **sizes, "norm_fn": norm}

    return {
        "_target_": f"{lewm}.LeWM",
        "encoder": {
            "_target_": "stable_pretraining.backbone.utils.vit_hf",
            "size": "tiny",
            "patch_size": c.patch_size,
            "image_size": c.image_size,
            "pretrained": False,
            "use_mask_token": False,
            "hidden_size": c.encoder_dim,
            "num_hidden_layers": c.encoder_depth,
            "num_attention_heads": c.encoder_heads,
            "intermediate_size": c.encoder_mlp,
        },
        "predictor": {
            "_target_": f"{lewm}.module.Predictor",
            "num_frames": c.history,
            "input_dim": c.embed_dim,
            "hidden_dim": c.predictor_dim,
            "output_dim": c.embed_dim,
            "depth": c.predictor_depth,
            "heads": c.predictor_heads,
            "mlp_dim": c.predictor_mlp,
            "dim_head": c.predictor_head_dim,
            "dropout": c.dropout,
            "emb_dropout": 0.0,
        },
        "action_encoder": {
            "_target_": f"{lewm}.module.Embedder",
            "input_dim": c.block_dim,
            "smoothed_dim": c.action_smoothed,
            "emb_dim": c.embed_dim,
            "mlp_scale": c.action_hidden // c.embed_dim,
        },
        "projector": projector(c.encoder_dim),
        "pred_proj": projector(c.embed_dim),
    }


def _downloaded(repository: str, revision: str | None) -> Path:
    """The model of a repository, in the cache of huggingface_hub, which downloads it whole or not at all."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"model file: no such file: {repository}; if it is a repository of the Hugging Face Hub: "
            'pip install "lewm-fast[data]"'
        ) from error

    unreachable: Exception | None = None

    def fetched(name: str) -> Path | None:
        nonlocal unreachable
        try:
            local = unreachable is not None  # asked once, the Hub is not asked again
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=local))
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
            return None
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            what = f"revision {revision} of {repository}" if isinstance(error, RevisionNotFoundError) else repository
            raise FileNotFoundError(
                f"model file: no such file: {repository}, and the Hugging Face Hub has no {what}, or shows it to others"
            ) from error
        except Exception as error:  # of whichever library it downloads with
            raise ConnectionError(
                f"model file: {name} of {repository} cannot be downloaded ({brief(error)})"
            ) from error

    for name in _NAMES:
        if name == _NAMES[1]:  # not after the weights: where those are, it has to be too
            fetched("config.json")
        path = fetched(name)
        if path is not None:
            _check_sum(path)
            return path
    if unreachable is not None:
        raise ConnectionError(
            f"model file: the Hugging Face Hub cannot be reached, and {repository} is not in its local cache "
            f"({brief(unreachable)})"
        ) from unreachable
    raise FileNotFoundError(f"model file: {repository} on the Hugging Face Hub holds none of {', '.join(_NAMES)}")


def _check_sum(path: Path) -> None:
    """Checks a file of the cache against its name there: the SHA-256, where the Hub stores it as a large file."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = hashlib.sha256(blob.read_bytes()).hexdigest()
        if found != blob.name:
            raise ValueError(
                f"model file: {path} is damaged, its SHA-256 is {found[:12]}... and not {blob.name[:12]}...: delete "
                f"{blob} and load it again"
            )


def _unpickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that torch wrote. Only tensors and containers are made of what is in the file."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'model file: {path} is a file of {error.name}\'s: pip install "lewm-fast[train]"; '
            "once saved by model.save it needs nothing"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of an unpickler
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}" if named else (brief(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model file: {path} holds more than tensors, or is damaged, and what a pickle says is not run here; want "
            f"a state dict: le-wm's files named weights.pt and *_weight.ckpt, not *_object.ckpt ({reason})"
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # as Lightning keeps it
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise ValueError(f"model file: {path} holds a {type(found).__name__} of other things, want a dict of tensors")
    arrays = {}
    for name, value in found.items():
        plain = value.layout is torch.strided and not (value.is_meta or value.is_complex() or value.is_quantized)
        # One that repeats what is stored would take as much memory as its shape asks for.
        if not plain or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"model file: {name} in {path} is no plain tensor of numbers")
        value = value.detach().contiguous()
        arrays[str(name)] = (value.float() if value.is_floating_point() else value.long()).numpy()
    return arrays


def _own(tensors: dict[str, Any]) -> dict[str, Any]:
    """Those of the model, whose names may have a prefix, as in Lightning's checkpoints."""
    last = "predictor.pos_embedding"
    prefix = next((name.removesuffix(last) for name in tensors if name.endswith(last)), "")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _heads(path: Path) -> dict[str, int]:
    """What a `config.json` says of heads and their width; the classes that it names are not looked at."""
    if not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        encoder, predictor = described["encoder"], described["predictor"]
        found = {name: int(predictor[name]) for name in ("heads", "dim_head") if name in predictor}
        if "num_attention_heads" in encoder or encoder.get("size") == "huge":  # 80 wide
            found["encoder_heads"] = int(encoder.get("num_attention_heads", 16))
        return found
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe it: {type(error).__name__} {brief(error)}") from None


def architecture(weights: dict[str, Any], heads: dict[str, int], action_dim: int | None) -> ModelConfig:
    """The architecture that these tensors are of, as far as their shapes tell; `check_weights` finds what is wrong."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in weights or len(weights[name].shape) != rank:
            raise ValueError(f"it lacks {name} with {rank} axes: want the state dict of a LeWorldModel")
        return tuple(weights[name].shape)

    def depth(pattern: str) -> int:
        return len({found[1] for name in weights if (found := re.match(pattern, name))})

    vit, transformer = "encoder.layers", "predictor.transformer.layers"
    patch = shape("encoder.embeddings.patch_embeddings.projection.weight", 4)
    tokens = shape("encoder.embeddings.position_embeddings", 3)[1]
    _, history, embed_dim = shape("predictor.pos_embedding", 3)
    inner, predictor_dim = shape(f"{transformer}.0.attn.to_qkv.weight", 2)
    smoothed, block_dim, _ = shape("action_encoder.patch_embed.weight", 3)
    if action_dim is None:
        action_dim = max(1, block_dim // 5 if block_dim % 5 == 0 else block_dim)
    if block_dim % action_dim:
        raise ValueError(
            f"its action blocks are {block_dim} wide, which is no whole number of actions of the width {action_dim} "
            "that stats have"
        )
    head_dim = heads.get("dim_head", _HEAD)
    return ModelConfig(
        action_dim=action_dim,
        image_size=math.isqrt(max(1, tokens - 1)) * patch[3],
        patch_size=patch[3],
        encoder_dim=patch[0],
        encoder_depth=depth(rf"{re.escape(vit)}\.(\d+)\."),
        encoder_heads=heads.get("encoder_heads", max(1, patch[0] // _HEAD)),
        encoder_mlp=shape(f"{vit}.0.mlp.fc1.weight", 2)[0],
        embed_dim=embed_dim,
        projector_hidden=shape("projector.net.0.weight", 2)[0],
        predictor_dim=predictor_dim,
        predictor_depth=depth(rf"{re.escape(transformer)}\.(\d+)\."),
        predictor_heads=heads.get("heads", max(1, inner // max(1, 3 * head_dim))),
        predictor_head_dim=head_dim,
        predictor_mlp=shape(f"{transformer}.0.mlp.net.1.weight", 2)[0],
        history=history,
        action_block=block_dim // action_dim,
        action_smoothed=smoothed,
        action_hidden=shape("action_encoder.embed.0.weight", 2)[0],
    )
