"""The mesh, and where every array lives on it. The same code runs on one CPU and on a cluster."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from textgen.config import Config, require

BATCH = ("data", "fsdp")  # the axes that split the rows of a batch
MOST_CORES = 4  # that are devices of their own: each holds all parameters; tried with two
FEWEST_TOKENS = 256  # of a step, for each of them


def use_cores() -> None:
    """Makes devices of the CPU's cores, unless the user has settled their number. Before the first array.

    One program leaves much of a second core idle; two that split a batch do not.
    """
    settled = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices < 0 and not settled:
        jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, MOST_CORES))


def make_mesh(config: Config) -> Mesh:
    """The mesh of mesh.data x mesh.fsdp x mesh.tensor devices.

    Where mesh.data is not given, it is the largest number of devices, of those there are, that the
    rows of a micro-batch divide by; on a CPU only as many as have enough to do.

    Raises:
      UserError: there are fewer devices than that, or several processes do not share the rows evenly.
    """
    mesh, there = config.mesh, jax.device_count()
    rows = config.data.batch_size // config.train.accumulation // mesh.fsdp
    data = mesh.data
    if data is None:
        most = max(there // (mesh.fsdp * mesh.tensor), 1)
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            most = max(min(most, rows * config.data.window // FEWEST_TOKENS), 1)
        data = max(n for n in range(1, most + 1) if rows % n == 0)
        require(
            jax.process_count() == 1 or data * mesh.fsdp * mesh.tensor == there,
            f"{jax.process_count()} processes have {there} devices, and the {rows} rows of a micro-batch do not divide "
            "by them: choose another data.batch_size, or mesh.data, mesh.fsdp and mesh.tensor.",
        )
    shape = (data, mesh.fsdp, mesh.tensor)
    wanted = data * mesh.fsdp * mesh.tensor
    require(
        wanted <= there,
        f"The mesh takes {data} x {mesh.fsdp} x {mesh.tensor} = {wanted} devices, and there "
        f"{'is' if there == 1 else 'are'} {there} ({jax.default_backend()}): lower one of them.",
    )
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


def share_rows(f: Callable[..., tuple[Any, Any]], mesh: Mesh) -> Callable[..., tuple[Any, Any]]:
    """f(params, rows, key) -> (totals, rows) of some rows, done by the devices along the mesh's data axis together.

    Each takes its part of the rows and a key of its own; the totals are summed over them.
    """
    if mesh.shape["data"] == 1:
        return f

    def part(params: Any, rows: Any, key: Any) -> tuple[Any, Any]:
        total, rows = f(params, rows, jax.random.fold_in(key, jax.lax.axis_index("data")))
        if jax.default_backend() == "cpu":  # takes longer to meet than to add: all leaves at once
            flat, unravel = ravel_pytree(total)
            return unravel(jax.lax.psum(flat, "data")), rows
        return jax.lax.psum(total, "data"), rows

    # check_vma: the models' loops begin with constants, which it takes for another kind of value than what follows.
    rows = P("data")
    specs = {"in_specs": (P(), rows, P()), "out_specs": (P(), rows)}
    return jax.shard_map(part, mesh=mesh, axis_names={"data"}, check_vma=False, **specs)


def on_one(tree: Any) -> Any:
    """The same arrays for programs of one device, without a copy; a tree of which anything is split, as it is."""
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


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


# Matrix products of bfloat16 without sparsity, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops() -> float | None:
    """Peak rate of one device in bfloat16 matrix products, FLOP/s; None where it is not known, as for a CPU."""
    kind = jax.devices()[0].device_kind
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
