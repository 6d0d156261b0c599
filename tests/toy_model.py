"""A model of a few hundred numbers with every kind of parameter, and what its folder must hold.

L layers, D width, F hidden width, V vocabulary.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mtllm_jax import config, sharding
from mtllm_jax.models.layers import Linear, RMSNorm, param

L, D, F, V = 3, 16, 24, 40
TABLE = {
    "embedding_VD": "model.embed.weight",
    "layers.norm.scale": "model.layers.{layer}.norm.weight",
    "layers.up.kernel": "model.layers.{layer}.up.weight",
    "layers.up.bias": "model.layers.{layer}.up.bias",
    "layers.down.kernel": "model.layers.{layer}.down.weight",
    "head.kernel": "head.weight",
}
SHAPES = {
    "model.embed.weight": (V, D),
    "head.weight": (V, D),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(L)
        for name, shape in {
            "norm.weight": (D,),
            "up.weight": (F, D),
            "up.bias": (F,),
            "down.weight": (D, F),
        }.items()
    },
}


class Layers(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.normal(1.0)
        self.norm = RMSNorm(D, 1e-5, rngs, L)
        self.up = Linear(D, F, ("embed", "ffn"), init=init, rngs=rngs, num_layers=L, use_bias=True)
        self.down = Linear(F, D, ("ffn", "embed"), init=init, rngs=rngs, num_layers=L)


class Toy(nnx.Module):
    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(jax.random.key(0, impl="rbg"))
        init = nnx.initializers.normal(1.0)
        self.embedding_VD = param(rngs, (V, D), ("vocab", "embed"), init)
        self.layers = Layers(rngs)
        self.head = Linear(D, V, ("embed", "vocab"), init=init, rngs=rngs)


def abstract():
    return nnx.eval_shape(Toy)


def random_tensors(dtype):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def saved(folder, tensors, num_files=1):
    """The tensors as safetensors itself writes them, in files of a few each."""
    names = sorted(tensors)
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def parameters_of(model):
    return {
        ".".join(map(str, keys)): value[...] for keys, value in nnx.to_flat_state(nnx.state(model))
    }


def expected_parameters(tensors, dtype):
    """By the definition: transposed where it is a kernel, stacked where it is a layer's."""
    result = {}
    for ours, theirs in TABLE.items():
        layers = range(L) if "{layer}" in theirs else [0]
        arrays = [tensors[theirs.replace("{layer}", str(layer))].astype(dtype) for layer in layers]
        arrays = [a.T for a in arrays] if ours.endswith("kernel") else arrays
        result[ours] = np.stack(arrays) if "{layer}" in theirs else arrays[0]
    return result


def random_model(dtype=jnp.float32, mesh=None):
    model = Toy()
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    return nnx.merge(graph, state if mesh is None else sharding.place(state, mesh))


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(config.Mesh(data=data, fsdp=fsdp, tensor=tensor), devices)
