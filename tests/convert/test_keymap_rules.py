"""Key maps that a user writes: what rules do to a checkpoint, and rules that are wrong."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.convert import keymaps
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6, "small_intermediate_size": 2}

# A GPT-NeoX-like checkpoint: q, k and v of each head together, matrices [in, out], an interleaved RoPE.
NEOX = r"""
[[rule]]
from = 'h\.(\d+)\.qkv\.w'
reshape = ["hidden", "heads", 3, "head_dim"]
transpose = [2, 1, 3, 0]
to = ['model.layers.\1.self_attn.q_proj.weight', 'model.layers.\1.self_attn.k_proj.weight',
      'model.layers.\1.self_attn.v_proj.weight']
shape = [-1, "hidden"]
permute = "interleaved_to_half"
heads = ["q", "kv", "none"]

[[rule]]
from = 'h\.(?P<layer>\d+)\.(?P<which>gate|up)_small'
to = 'model.layers.\g<layer>.mlp.small.\g<which>_proj.weight'
transpose = true

[[rule]]
from = 'h\.(\d+)\.ffn'
to = ['model.layers.\1.mlp.big.gate_proj.weight', 'model.layers.\1.mlp.small.gate_proj.weight']
sizes = ["big", "small"]
axis = 1

[[rule]]
from = '.*table'
drop = true
"""


def test_rules(tmp_path):
    file = tmp_path / "neox.toml"
    file.write_text(NEOX)
    keymap = keymaps.from_file(file)
    config = SIZES | {"num_attention_heads": 2}  # hidden 8, heads of 4
    random = np.random.default_rng(0)
    qkv, up, ffn = (random.standard_normal(shape).astype(np.float32) for shape in ((8, 24), (8, 2), (3, 8)))
    given = {"h.7.qkv.w": qkv, "h.7.up_small": up, "h.7.ffn": ffn, "cos_table": up, "model.norm.weight": ffn[0]}
    found = keymap.to_canonical({name: Tensor.of(mx.array(value)) for name, value in given.items()}, config)
    q, k, v = (qkv.T.reshape(2, 3, 4, 8)[:, part] for part in range(3))
    expected = {
        "model.layers.7.self_attn.q_proj.weight": q[:, [0, 2, 1, 3]].reshape(8, 8),
        "model.layers.7.self_attn.k_proj.weight": k[:, [0, 2, 1, 3]].reshape(8, 8),
        "model.layers.7.self_attn.v_proj.weight": v.reshape(8, 8),
        "model.layers.7.mlp.small.up_proj.weight": up.T,
        "model.layers.7.mlp.big.gate_proj.weight": ffn[:, :6],
        "model.layers.7.mlp.small.gate_proj.weight": ffn[:, 6:],
        "model.norm.weight": ffn[0],
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(np.array(found[name].load()), value, err_msg=name)
    with pytest.raises(DuoError, match="neox.toml: rules lead to canonical names, not back"):
        keymap.from_canonical(found, config)


def test_equal_parts_are_the_default_and_the_layout_can_be_said(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text("[[rule]]\nfrom = '(.*)qkv(.*)'\nto = ['\\1q\\2', '\\1k\\2', '\\1v\\2']\n")
    name = "model.layers.0.self_attn.{}_proj.bias"
    given = {name.format("qkv"): Tensor.of(mx.arange(24.0))}
    found = keymaps.from_file(file, "interleaved").to_canonical(given, SIZES)
    assert found[name.format("k")].load().tolist() == [8, 10, 9, 11, 12, 14, 13, 15]
    assert found[name.format("v")].load().tolist() == list(range(16, 24))


WRONG = {
    "key": ("from = 'a'\ninto = 'b'", "rule 2: 'into' is no key of a rule; known are from, to,"),
    "no from": ("to = 'b'", "rule 2: from must be a regular expression"),
    "no to": ("from = 'a'", "rule 2: needs a to"),
    "expression": ("from = '('\nto = 'b'", "rule 2: from is no regular expression: missing"),
    "group": ("from = '(a)'\nto = '\\2'", r"rule 2: to '\\\\2': invalid group reference"),
    "named group": ("from = '(a)'\nto = '\\g<n>'", "rule 2: to .*: unknown group name 'n'"),
    "group of flags": ("from = '(?x) (a) # b'\nto = '\\2'", "rule 2: to .*: invalid group"),
    "sizes": ("from = 'a'\nto = ['b', 'c']\nsizes = [1]", "rule 2: to has 2 names, sizes 1"),
    "size": ("from = 'a'\nto = 'b'\nreshape = ['wide']", "rule 2: reshape has 'wide'; a size is"),
    "size 0": ("from = 'a'\nto = 'b'\nreshape = [0]", "rule 2: reshape has 0"),
    "size true": ("from = 'a'\nto = 'b'\nshape = [true]", "rule 2: shape has True"),
    "sizes -1": ("from = 'a'\nto = ['b', 'c']\nsizes = [1, -1]", "rule 2: sizes is .*; it may hold no -1"),
    "two -1": ("from = 'a'\nto = 'b'\nreshape = [-1, -1]", "rule 2: reshape is .*; it may hold only one -1"),
    "reshape": ("from = 'a'\nto = 'b'\nreshape = 3", "rule 2: reshape is 3; it must be a list"),
    "axis": ("from = 'a'\nto = 'b'\naxis = -1", "rule 2: axis is -1"),
    "transpose": ("from = 'a'\nto = 'b'\ntranspose = [0, 0]", "rule 2: transpose is .*; it must hold each axis once"),
    "transpose text": ("from = 'a'\nto = 'b'\ntranspose = 'T'", "rule 2: transpose is 'T'; it must be true or a list"),
    "permute": ("from = 'a'\nto = 'b'\npermute = 'x'\nheads = 'q'", "rule 2: permute is 'x'; it must be interleaved_"),
    "no heads": ("from = 'a'\nto = 'b'\npermute = 'interleaved_to_half'", "rule 2: permute and heads"),
    "heads": (
        "from = 'a'\nto = 'b'\npermute = 'interleaved_to_half'\nheads = 'v'",
        'rule 2: heads is .*; it must be "q"',
    ),
    "drop": ("from = 'a'\nto = 'b'\ndrop = true", "rule 2: drop = true goes with from alone"),
    "drop text": ("from = 'a'\ndrop = 'yes'", "rule 2: drop is 'yes'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rule_is_one_line_with_file_and_number(tmp_path, case):
    rule, line = WRONG[case]
    file = tmp_path / "rules.toml"
    file.write_text(f"[[rule]]\nfrom = 'x'\nto = 'y'\n[[rule]]\n{rule}\n")
    with pytest.raises(DuoError, match=f"rules.toml: {line}") as error:
        keymaps.from_file(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[[rule", "is no TOML"),
        (b"\xff", "is no TOML"),
        (b"", r"must hold \[\[rule\]\] tables"),
        (b"rule = 1", r"must hold \[\[rule\]\] tables"),
        (b"[rules]", "has 'rules'; a key map holds"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_a_file_that_holds_no_rules(tmp_path, content, line):
    file = tmp_path / "rules.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DuoError, match=f"rules.toml: {line}"):
        keymaps.from_file(file)


UNFIT = {
    "sizes": ("to = ['b', 'c']\nsizes = [1, 'q']", r"\[6, 4\] cannot be split into \[1, 8\] along axis 0"),
    "parts": ("to = ['b', 'c', 'd', 'e']", r"its shape \[6, 4\] has no 4 equal parts along axis 0"),
    "axis": ("to = ['b', 'c']\naxis = 2", r"its shape \[6, 4\] has no axis 2"),
    "reshape": ("to = 'b'\nreshape = [5, -1]", r"reshape \[5, -1\] does not fit its shape \[6, 4\]"),
    "shape": ("to = ['b', 'c']\nshape = [24]", r"shape \[24\] does not fit its shape \[3, 4\]"),
    "transpose": ("to = 'b'\ntranspose = [0, 2, 1]", r"transpose \[0, 2, 1\] does not fit its shape \[6, 4\]"),
    "permute": (
        "to = 'b'\npermute = 'half_to_interleaved'\nheads = 'q'",
        r"permute needs 8 rows \(q\), but its shape is \[6, 4\]",
    ),
    "config": ("to = ['b', 'c']\nsizes = ['small', 1]", "config.json lacks small_intermediate_size"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_tensor_that_a_rule_does_not_fit(tmp_path, case):
    rule, line = UNFIT[case]
    file = tmp_path / "rules.toml"
    file.write_text(f"[[rule]]\nfrom = 'a'\n{rule}\n")
    config = {"hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(DuoError, match=f"rules.toml: rule 1: a: .*{line}"):
        keymaps.from_file(file).to_canonical({"a": Tensor.of(mx.ones((6, 4)))}, config)


def test_two_sources_for_one_target(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text("[[rule]]\nfrom = 'a|b'\nto = 'c'\n")
    one, keymap = Tensor.of(mx.ones(1)), keymaps.from_file(file)
    with pytest.raises(DuoError, match="rules.toml: rule 1: b becomes c, which rule 1: a is already"):
        keymap.to_canonical({"a": one, "b": one}, {})
    with pytest.raises(DuoError, match="rules.toml: rule 1: a becomes c, which c .that no rule matches. is already"):
        keymap.to_canonical({"c": one, "a": one}, {})
