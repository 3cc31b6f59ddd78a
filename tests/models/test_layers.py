"""Scanned layers are the layers one by one: in what they compute, learn and draw, and where they live."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCANNED, noisy_params, tiny

from textgen import models, parallel
from textgen.models import layers
from textgen.training import optimizers

V, LAYERS = 11, 2


def build(name, overrides=None):
    return models.build(tiny({"model.backbone": name, "model.layers": LAYERS} | (overrides or {})), V)


def unstacked(params):
    """The parameters of scanned layers (or what has their shape) as the net without a scan has them."""
    backbone = dict(params["backbone"])
    blocks = backbone.pop("blocks")
    each = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(LAYERS)}
    return {**params, "backbone": backbone | each}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANNED)
def test_logits_carry_and_gradients_are_those_without_a_scan(name):
    scanned = build(name, {"model.scan_layers": True, "model.norm": "layernorm"})
    each, params = build(name, {"model.norm": "layernorm"}), noisy_params(scanned)
    tokens, lengths = np.random.default_rng(0).integers(0, V, (3, 6)).astype(np.int32), np.array([6, 3, 0], np.int32)

    def run(model, params):
        _, carry = model.apply({"params": params}, tokens, model.init_carry(3, 8), lengths)
        after, carry = model.apply({"params": params}, tokens[:, :1], carry)
        logits, back = jax.vjp(lambda p: model.apply({"params": p}, tokens)[0], params)
        return (logits, after), getattr(carry, "memory", carry), back(jnp.cos(logits))[0]

    expected, memory, gradients = jax.jit(lambda p: run(each, p))(unstacked(params))
    got, stacked, stacked_gradients = jax.jit(lambda p: run(scanned, p))(params)
    close(got, expected)
    close(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *memory))
    close(unstacked(stacked_gradients), gradients, 1e-4)


class Draws(nn.Module):
    """A block whose state is its weight and its mask."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(), (8,))
        return x, (weight + 0 * x, layers.Dropout(0.5, name="dropout")(jnp.ones_like(x), True))


def test_each_layer_draws_its_own_weights_and_masks():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    (_, drawn), _ = layers.scanned(Draws, 3, ())().init_with_output(keys, jnp.ones((5, 8)))
    for state in map(np.asarray, drawn):
        assert state.shape == (5, 3, 8)  # behind the batch
        assert not any(np.array_equal(state[:, i], state[:, j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("optimizer", "name"), [*((o, "transformer") for o in ("adamw", "muon", "lion", "sgd")), ("muon", "mingru")]
)
@pytest.mark.slow
def test_a_step_of_every_optimizer_is_that_without_a_scan(optimizer, name):
    settings = {"optimizer.name": optimizer, "optimizer.weight_decay": 0.5, "optimizer.clip_norm": 1.0}
    optimizer = optimizers.build(tiny(settings).optimizer, 10)
    scanned = build(name, {"model.scan_layers": True, "model.norm": "layernorm"})
    params, gradients = noisy_params(scanned), noisy_params(scanned, seed=1)
    step = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])
    close(unstacked(step(params, gradients)), step(unstacked(params), unstacked(gradients)), 1e-6)


@pytest.mark.parametrize("name", SCANNED)
def test_no_device_holds_some_layers_alone(name):
    mesh = parallel.make_mesh(tiny({"mesh.fsdp": 2, "mesh.tensor": 2}))
    params = noisy_params(build(name, {"model.scan_layers": True}))
    spec = lambda tree: jax.tree.map(lambda sharding: sharding.spec, parallel.shardings(tree, mesh))
    stacked, each = spec(params)["backbone"]["blocks"], spec(unstacked(params))["backbone"]["block_0"]
    assert stacked == jax.tree.map(lambda spec: jax.P(None, *spec), each)


@pytest.mark.parametrize("name", SCANNED)
def test_the_program_does_not_grow_with_depth(name):
    def lines(depth):
        model = build(name, {"model.scan_layers": True, "model.layers": depth, "model.dropout": 0.1})
        tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        loss = lambda p, t: jnp.sum(model.apply(p, t, train=True, rngs={"dropout": jax.random.key(0)})[0])
        return len(jax.jit(jax.grad(loss)).lower(params, tokens).as_text().splitlines())

    assert lines(8) == lines(2)


@pytest.mark.parametrize(("inputs", "features"), [(6, 4), (4, 6)])
def test_a_linear_maps_derivatives_are_those_of_the_product(inputs, features):
    linear, random = layers.Linear(features, dtype=jnp.dtype("float32")), np.random.default_rng(0)
    x, kernel, direction = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((2, 5, inputs), (inputs, features), (inputs, features))
    )
    apply, product = lambda w: linear.apply({"params": {"kernel": w}}, x), lambda w: x @ w
    loss = lambda f: lambda w: jnp.sum(jnp.sin(f(w)))

    def derivatives(f):
        gradient = jax.grad(loss(f))
        forward = jax.jvp(gradient, (kernel,), (direction,))
        return jax.jvp(f, (kernel,), (direction,)), forward, jax.vmap(gradient)(jnp.stack([kernel, direction]))

    close(*(jax.jit(functools.partial(derivatives, f))() for f in (apply, product)))
    # On the CPU the longer side of a weight's gradient comes last.
    compiled = jax.jit(jax.grad(loss(apply))).lower(kernel).compile().as_text()
    short, long = sorted((inputs, features))
    assert f"f32[{short},{long}]{{1,0}} dot(" in compiled
    assert f"f32[{long},{short}]{{1,0}} dot(" not in compiled
