"""Key maps: bijections by property, names and layouts against transformers and MLX."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from duo_mlx.convert import keymaps
from duo_mlx.convert.keymaps import rope
from duo_mlx.convert.keymaps.base import split
from duo_mlx.convert.plan import expected_shapes
from duo_mlx.convert.tensors import DTYPES, Tensor, to_mlx
from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs


@st.composite
def models(draw):
    """A config.json and whether its model is dense."""
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    heads = kv_heads * draw(st.integers(1, 3))
    explicit = draw(st.booleans())
    return {
        "hidden_size": draw(st.integers(1, 5)) if explicit else heads * head_dim,
        "head_dim": head_dim if explicit else None,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "intermediate_size": draw(st.integers(1, 5)),
        "small_intermediate_size": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if kv_heads != heads else draw(st.sampled_from([None, heads])),
        "rms_norm_eps": 1e-5,
        "vocab_size": 3,
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_traditional": draw(st.booleans()),
    }, draw(st.booleans())


def filled(shapes, dtype, seed=0):
    """Tensors of random bits, so that NaNs and infinities are among them."""
    random = np.random.default_rng(seed)
    kind = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}[dtype]
    bits = {name: random.integers(0, np.iinfo(kind).max, shape, kind) for name, shape in shapes.items()}
    return {name: Tensor.of(mx.array(value).view(getattr(mx, dtype))) for name, value in bits.items()}


def shapes(config, dense=False):
    """Names and shapes of a Duo, or of the dense model that it may be made of."""
    found = expected_shapes(ModelArgs.from_dict(config | ({"small_layers": []} if dense else {})))
    return {name.replace(".big.", ".") if dense else name: shape for name, shape in found.items()}


def bits(tensor):
    array = tensor.load()
    assert array.shape == tensor.shape and str(array.dtype) == f"mlx.core.{tensor.dtype}"
    return np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size]))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor == b[name]
        np.testing.assert_array_equal(bits(tensor), bits(b[name]), err_msg=name)


def multiset(tensors):
    return np.sort(np.concatenate([bits(tensor).ravel() for tensor in tensors.values()]))


@pytest.mark.parametrize("layout", [None, *keymaps.LAYOUTS])
@pytest.mark.parametrize("name", keymaps.NAMES)
@given(model=models(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=50, deadline=None)
def test_every_map_is_a_bijection(name, layout, model, dtype):
    config, dense = model
    keymap = keymaps.named(name, layout)
    canonical = filled(shapes(config, dense), dtype)
    theirs = keymap.from_canonical(canonical, config)
    assert_same(keymap.to_canonical(theirs, config), canonical)
    np.testing.assert_array_equal(multiset(theirs), multiset(canonical))
    others = filled({key: tensor.shape for key, tensor in theirs.items()}, dtype, seed=1)
    assert_same(keymap.from_canonical(keymap.to_canonical(others, config), config), others)
    assert keymaps.detect(theirs).name == name


LLAMA = """
tok_embeddings.weight                     model.embed_tokens.weight
norm.weight                               model.norm.weight
output.weight                             lm_head.weight
layers.11.attention_norm.weight           model.layers.11.input_layernorm.weight
layers.11.ffn_norm.weight                 model.layers.11.post_attention_layernorm.weight
layers.11.attention.wq.weight             model.layers.11.self_attn.q_proj.weight
layers.11.attention.wk.bias               model.layers.11.self_attn.k_proj.bias
layers.11.attention.wv.weight             model.layers.11.self_attn.v_proj.weight
layers.11.attention.wo.weight             model.layers.11.self_attn.o_proj.weight
"""
LLAMA_DENSE = """
layers.2.feed_forward.w1.weight           model.layers.2.mlp.gate_proj.weight
layers.2.feed_forward.w2.bias             model.layers.2.mlp.down_proj.bias
layers.2.feed_forward.w3.weight           model.layers.2.mlp.up_proj.weight
"""
LLAMA_DUO = """
layers.2.feed_forward.big.w1.weight       model.layers.2.mlp.big.gate_proj.weight
layers.2.feed_forward.big.w2.bias         model.layers.2.mlp.big.down_proj.bias
layers.2.feed_forward.small.w3.weight     model.layers.2.mlp.small.up_proj.weight
layers.2.feed_forward.router.weight       model.layers.2.mlp.router.weight
"""
# read, never written
LLAMA_BESIDE = """
layers.2.feed_forward.w1.weight           model.layers.2.mlp.big.gate_proj.weight
layers.2.feed_forward.w2.bias             model.layers.2.mlp.big.down_proj.bias
layers.2.feed_forward_small.w3.weight     model.layers.2.mlp.small.up_proj.weight
layers.3.feed_forward.w1.weight           model.layers.3.mlp.big.gate_proj.weight
layers.3.small_feed_forward.w2.weight     model.layers.3.mlp.small.down_proj.weight
layers.4.feed_forward.w1.weight           model.layers.4.mlp.big.gate_proj.weight
"""
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6, "small_intermediate_size": 2}


@pytest.mark.parametrize(
    ("name", "names", "back"),
    [
        ("llama", LLAMA + LLAMA_DENSE, True),
        ("llama", LLAMA + LLAMA_DUO, True),
        ("llama", LLAMA_BESIDE, False),
    ],
)
def test_names(name, names, back):
    pairs = dict(line.split() for line in names.split("\n") if line)
    tensors = {theirs: Tensor.of(mx.array([number])) for number, theirs in enumerate(pairs)}
    canonical = keymaps.named(name).to_canonical(tensors, SIZES)
    assert {ours: tensor.load().item() for ours, tensor in canonical.items()} == {
        ours: number for number, ours in enumerate(pairs.values())
    }
    if back:
        assert list(keymaps.named(name).from_canonical(canonical, SIZES)) == list(pairs)


def test_llamas_own_table_is_dropped_and_what_is_unknown_passes():
    one = Tensor.of(mx.ones(1))
    given = {"rope.freqs": one, "layers.0.attention.wx.weight": one, "model.layers.0.mlp.router.weight": one}
    assert keymaps.named("llama").to_canonical(given, SIZES).keys() == given.keys() - {"rope.freqs"}


def test_two_tensors_of_one_name_are_an_error():
    one = Tensor.of(mx.ones(1))
    with pytest.raises(DuoError, match="^norm.weight and model.norm.weight are both model.norm.weight$"):
        keymaps.named("llama").to_canonical({"norm.weight": one, "model.norm.weight": one}, SIZES)
    layer = "layers.0.feed_forward"
    spellings = {f"{layer}_small.w1.weight": one, f"{layer}.w1.weight": one, f"{layer}.big.w1.weight": one}
    with pytest.raises(DuoError, match="are both model.layers.0.mlp.big.gate_proj.weight"):
        keymaps.named("llama").to_canonical(spellings, SIZES)


def test_fused_names_are_those_of_transformers_phi3():
    """Phi-3 is Llama with fused matrices: mlx-lm's llama with the split ones must give Phi-3's logits."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    phi = Phi3ForCausalLM(
        Phi3Config(**sizes, pad_token_id=0, initializer_range=0.3, attn_implementation="eager")
    ).eval()
    state = {name: Tensor.of(to_mlx(value)) for name, value in phi.state_dict().items()}
    keymap = keymaps.detect(state)
    assert keymap.name == "fused"
    config = sizes | {"small_intermediate_size": 1, "tie_word_embeddings": False}
    dense = keymap.to_canonical(state, config)
    weights = {name.replace(".mlp.", ".mlp.big."): tensor.load() for name, tensor in dense.items()}
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(list(weights.items()), strict=False)
    tokens = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        theirs = phi(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), theirs, atol=1e-4)


def test_partial_fusing_is_read():
    config = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 3}
    given = {
        "model.layers.0.self_attn.qkv_proj.bias": Tensor.of(mx.arange(8.0)),
        "model.layers.0.mlp.gate_proj.weight": Tensor.of(mx.ones((3, 4))),
    }
    found = keymaps.named("fused").to_canonical(given, config)
    assert {name.rpartition("0.")[2]: tensor.load().tolist() for name, tensor in found.items()} == {
        "self_attn.q_proj.bias": [0, 1, 2, 3],
        "self_attn.k_proj.bias": [4, 5],
        "self_attn.v_proj.bias": [6, 7],
        "mlp.gate_proj.weight": [[1] * 4] * 3,
    }
    assert keymaps.named("fused").from_canonical(found, config).keys() == given.keys()
    del found["model.layers.0.self_attn.k_proj.bias"]  # what is not complete is not fused
    assert keymaps.named("fused").from_canonical(found, config).keys() == found.keys()


def test_what_cannot_be_split_or_joined_is_named():
    fused = keymaps.named("fused")
    config = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 3}
    with pytest.raises(DuoError, match=r"qkv_proj.weight \[9, 4\] cannot be split into \[4, 4, 4\] along axis 0"):
        fused.to_canonical({"model.layers.0.self_attn.qkv_proj.weight": Tensor.of(mx.ones((9, 4)))}, config)
    with pytest.raises(DuoError, match=r"gate_up_proj.weight \[3, 4\] cannot be split into \[1, 1\]"):
        fused.to_canonical({"model.layers.0.mlp.small.gate_up_proj.weight": Tensor.of(mx.ones((3, 4)))}, config)
    with pytest.raises(DuoError, match="num_attention_heads is '2'; it must be a positive integer"):
        fused.to_canonical(
            {"model.layers.0.self_attn.qkv_proj.weight": Tensor.of(mx.ones((9, 4)))},
            config | {"num_attention_heads": "2"},
        )
    halves = {
        "model.layers.0.mlp.gate_proj.weight": Tensor.of(mx.ones((3, 4))),
        "model.layers.0.mlp.up_proj.weight": Tensor.of(mx.ones((3, 4), mx.float16)),
    }
    with pytest.raises(DuoError, match=r"gate_proj.weight \[3, 4\] float32 and .* float16 cannot be one tensor"):
        fused.from_canonical(halves, config)


def test_nothing_is_loaded_before_it_is_asked_for():
    def refuse():
        raise AssertionError("was loaded")

    lazy = Tensor((8, 4), "float32", refuse)
    q, _ = split("", lazy, [4, 4])
    assert q.shape == (4, 4)
    name = "model.layers.0.self_attn.q_proj.weight"
    config = {"hidden_size": 4, "num_attention_heads": 2, "head_dim": 4}
    found = keymaps.named("canonical", "interleaved").to_canonical({name: lazy}, config)[name]
    assert found.shape == (8, 4)
    with pytest.raises(AssertionError, match="was loaded"):
        found.load()


def attention(x, q, k, bias, heads, kv_heads, traditional):
    """Attention weights ``[heads, tokens, tokens]`` of ``x [tokens, hidden]``, with MLX's own RoPE."""

    def rotated(weight, count, bias):
        rows = (x @ weight.T + bias).reshape(1, len(x), count, -1).transpose(0, 2, 1, 3)
        return mx.fast.rope(rows, rows.shape[-1], traditional=traditional, base=1e4, scale=1.0, offset=0)[0]

    queries, keys = rotated(q, heads, bias[0]), rotated(k, kv_heads, bias[1])
    return mx.softmax(queries @ mx.repeat(keys, heads // kv_heads, axis=0).swapaxes(1, 2), axis=-1)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 6), (6, 2, 4), (3, 1, 8)])
def test_permuted_rows_give_the_same_attention(heads, kv_heads, head_dim):
    mx.random.seed(0)
    x = mx.random.normal((7, 5))
    q, k = mx.random.normal((heads * head_dim, 5)), mx.random.normal((kv_heads * head_dim, 5))
    biases = mx.random.normal((heads * head_dim,)), mx.random.normal((kv_heads * head_dim,))
    expected = np.array(attention(x, q, k, biases, heads, kv_heads, traditional=True))
    there_q, there_k = rope.interleaved_to_half(heads, head_dim), rope.interleaved_to_half(kv_heads, head_dim)
    moved = there_q(q), there_k(k), (there_q(biases[0]), there_k(biases[1]))
    found = np.array(attention(x, *moved, heads, kv_heads, traditional=False))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    unmoved = np.array(attention(x, q, k, biases, heads, kv_heads, traditional=False))
    assert np.abs(unmoved - expected).max() > 1e-2  # the test can see a difference
    back = rope.half_to_interleaved(heads, head_dim)
    assert mx.array_equal(back(there_q(q)), q)


@pytest.mark.parametrize("name", ["llama", "fused", "canonical"])
def test_either_target_layout_gives_the_same_logits(tiny_config, name):
    """Weights of an interleaved source: permuted for a model that runs halves, as they are for a traditional one."""
    config = tiny_config(attention_bias=True)
    source = {
        name: Tensor.of(mx.random.normal(shape, key=mx.random.key(number)) / 2)
        for number, (name, shape) in enumerate(shapes(config).items())
    }
    plain, keymap = keymaps.named(name, "half"), keymaps.named(name, "interleaved")
    theirs = plain.from_canonical(source, config)  # renamed, not permuted
    logits = []
    for traditional in (True, False):
        target = config | {"rope_traditional": traditional}
        model = Model(ModelArgs.from_dict(target))
        canonical = keymap.to_canonical(theirs, target)
        if traditional:
            assert_same(canonical, source)
        model.load_weights([(key, tensor.load()) for key, tensor in canonical.items()])
        logits.append(np.array(model(mx.array([[1, 2, 3, 4, 5, 6, 7]]))))
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_canonical_weights_are_what_the_model_runs(tiny_config):
    for traditional in (True, False):
        config = tiny_config(rope_traditional=traditional)
        tensors = filled(shapes(config), "float32")
        assert_same(keymaps.named("canonical").to_canonical(tensors, config), tensors)
        moved = keymaps.named("canonical", "half").to_canonical(tensors, config)
        name = "model.layers.0.self_attn.k_proj.weight"
        assert np.array_equal(bits(moved[name]), bits(tensors[name])) is not traditional


def test_a_wrong_shape_is_left_to_the_plan_and_odd_heads_are_refused():
    name = "layers.0.attention.wq.weight"
    wrong = {name: Tensor.of(mx.ones((5, 4)))}
    assert [t.shape for t in keymaps.named("llama").to_canonical(wrong, SIZES).values()] == [(5, 4)]
    with pytest.raises(DuoError, match="heads of 3 channels cannot be rotated"):
        keymaps.named("llama").to_canonical({name: Tensor.of(mx.ones((6, 4)))}, SIZES | {"head_dim": 3})


def test_names_that_fit_nothing(tmp_path):
    with pytest.raises(DuoError, match=r"w.pt: its names \(h.0.attn, h.1.attn, wpe ...\) fit none .* --key-map FILE$"):
        keymaps.detect(["wte", "wpe", "h.0.attn", "h.1.attn"], tmp_path / "w.pt")
    with pytest.raises(DuoError, match="no key map 'hf'; known are canonical, llama, fused"):
        keymaps.named("hf")
    with pytest.raises(DuoError, match="layout is 'neox'; it must be half or interleaved"):
        keymaps.named("llama", "neox")
