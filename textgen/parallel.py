"""The mesh, and where every array lives on it. The same code runs on one CPU and on a cluster."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from textgen.config import MeshConfig, require

BATCH = ("data", "fsdp")  # the axes that split the rows of a batch


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of mesh.data x mesh.fsdp x mesh.tensor devices.

    Raises:
      UserError: there are fewer devices than that.
    """
    wanted = config.data * config.fsdp * config.tensor
    there = jax.device_count()
    require(
        wanted <= there,
        f"The mesh takes {config.data} x {config.fsdp} x {config.tensor} = {wanted} devices, and there "
        f"{'is' if there == 1 else 'are'} {there} ({jax.default_backend()}): lower one of them.",
    )
    shape = (config.data, config.fsdp, config.tensor)
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:wanted]
    )


def workers() -> int:
    """Threads that compute side by side: XLA leaves most of a small program to one core. An accelerator takes turns."""
    return os.cpu_count() or 1 if jax.default_backend() == "cpu" else 1


def initialize_distributed() -> None:
    """Joins the other processes, where a launcher has said that there are any."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()


def batch_sharding(mesh: Mesh, ndim: int, axis: int) -> NamedSharding:
    """An array whose `axis` counts the rows of a batch."""
    return NamedSharding(mesh, P(*(BATCH if i == axis else None for i in range(ndim))))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from one that every process holds alike."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def layer_axes(path: Any) -> int:
    """1 where a parameter's first axis counts layers: those of scanned blocks, named so in textgen/models; else 0."""
    return int(any(getattr(key, "key", None) == "blocks" for key in path))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of a state: its last axis over tensor, the largest other one over fsdp.

    What an axis does not divide, vectors, and an axis of layers stay whole. An optimizer's moments
    have the names and shapes of the parameters, and so their places.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        layers = layer_axes(path)
        if leaf.ndim - layers >= 2:
            if leaf.shape[-1] % mesh.shape["tensor"] == 0 and mesh.shape["tensor"] > 1:
                spec[-1] = "tensor"
            rest = [i for i in range(layers, leaf.ndim) if spec[i] is None and leaf.shape[i] % mesh.shape["fsdp"] == 0]
            if rest and mesh.shape["fsdp"] > 1:
                spec[max(rest, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)
